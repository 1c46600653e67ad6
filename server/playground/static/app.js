// The page: reads the form, draws, shows how far it is, and keeps what was drawn.

import { blobOf, draw, explain } from './client.js';
import { element, Form, loadSchemas, ratioOf } from './form.js';
import { Gallery } from './gallery.js';
import { History } from './history.js';
import { Source } from './source.js';
import { ServerState } from './state.js';

const IDEAS = ['A red apple on a wooden table, morning light', 'A lighthouse in a storm, oil on canvas',
  'A fox asleep in autumn leaves, 35 mm photograph', 'An isometric paper model of a small harbour town'];
const PROPOSED = 6; // of the things that a stand-in knows
const STAGES = { queued: 'Waiting', waking: 'Waking the model', text: 'Reading the prompt', denoise: 'Drawing', decode: 'Developing the pixels',
  safety: 'Checking the image', encode: 'Writing the file' };
const KEY = 'srpo-key';
const THEME = 'srpo-theme';
const at = (id) => document.getElementById(id);
let schemas = [];
let form;
let drawing = null; // the AbortController of the request on its way
const loading = loadSchemas(); // on its way while the history is opened
loading.catch(() => {}); // told where it is awaited
const history = await new History().open();
const gallery = new Gallery(at('gallery'), at('large'), { again, vary, begin, remove, say, key });
const source = new Source({ input: at('source'), chosen: at('source-chosen'), image: at('source-image'), name: at('source-name'),
  remove: at('source-remove'), drop: at('form') }, { changed: showForm, say, problem });

// ---- Keys and theme

function stored(name) {
  try { return sessionStorage.getItem(name) ?? localStorage.getItem(name) ?? ''; } catch { return ''; }
}

function store(name, value, keep) {
  try {
    for (const place of [sessionStorage, localStorage]) place.removeItem(name);
    if (value) (keep ? localStorage : sessionStorage).setItem(name, value);
  } catch { /* the browser keeps nothing: it holds until the page is closed */ }
}

function key() {
  return stored(KEY);
}

function askForKey(reason) {
  if (reason) at('key-reason').textContent = reason;
  at('key').value = key();
  at('key-dialog').showModal();
  at('key').select();
}

function showTheme(theme) {
  if (theme) document.documentElement.dataset.theme = theme;
  else delete document.documentElement.dataset.theme;
  at('theme').textContent = `Theme: ${theme || 'auto'}`;
}

// ---- The form

const kept = {}; // what was chosen, also in the form that is not shown

/** Draws the form anew when a picture comes or goes. */
function showForm() {
  const schema = schemas.find(({ properties }) => Boolean(properties.image_url) === Boolean(source.url));
  if (!schema || (form && form.model === schema.properties.model.enum[0])) return;
  for (const name of form?.names ?? []) delete kept[name];
  Object.assign(kept, form?.chosen());
  form = new Form(at('fields'), schema);
  form.fill(kept);
}

// ---- Drawing

function say(text) {
  at('status').textContent = text;
}

function problem(text) {
  at('problem').textContent = text;
  at('problem').hidden = !text;
  at('prompt').setAttribute('aria-invalid', String(Boolean(text) && !at('prompt').value.trim()));
}

/** The request that the form describes, or null after saying what is wrong with it. */
function read() {
  const prompt = at('prompt').value.trim();
  try {
    if (!prompt) throw new Error('Describe the image first.');
    if ([...prompt].length > form.maxPrompt) throw new Error(`The prompt is longer than ${form.maxPrompt} characters.`);
    return { model: form.model, prompt, ...(source.url && { image_url: source.url }), ...form.read() };
  } catch (error) {
    problem(error.message);
    if (!prompt) at('prompt').focus();
    return null;
  }
}

function show(body) {
  const size = body.image_size ?? 'landscape_4_3';
  const ratio = body.image_url ? Math.min(3, Math.max(1 / 3, source.ratio)) : typeof size === 'string' ? ratioOf(size) : size.width / size.height;
  at('canvas').style.aspectRatio = ratio;
  at('canvas').style.width = `min(100%, ${68 * ratio}vh)`;
  at('preview').hidden = true;
  at('bar').removeAttribute('value');
  at('step').textContent = 'Drawing …';
}

function progress(now) {
  const several = now.num_images > 1 ? `Image ${now.image_index + 1} of ${now.num_images} · ` : '';
  const left = now.eta_seconds >= 1 ? ` · about ${Math.round(now.eta_seconds)} s left` : '';
  const line = now.queue_position ? `${now.queue_position} ahead in the line` : STAGES[now.stage] ?? now.stage;
  const step = now.stage === 'denoise' ? `: step ${now.step} of ${now.steps}` : '';
  at('step').textContent = `${several}${line}${step}${left}`;
  if (['queued', 'waking'].includes(now.stage)) at('bar').removeAttribute('value');
  else at('bar').value = Math.min(0.97, (now.image_index + (now.stage === 'text' ? 0 : now.step / Math.max(1, now.steps))) / now.num_images);
  if (progress.stage !== `${now.stage} ${now.image_index}`) say(`${several}${line}`); // once a stage: not every step aloud
  progress.stage = `${now.stage} ${now.image_index}`;
}

function preview(event) {
  at('preview').src = `data:image/${event.output_format};base64,${event.b64_json}`;
  at('preview').hidden = false;
}

function busy(now) {
  at('running').hidden = !now;
  at('generate').hidden = now;
  at('cancel').hidden = !now;
  at('form').setAttribute('aria-busy', String(now));
  showEmpty();
}

async function generate(body) {
  if (drawing) return;
  drawing = new AbortController();
  problem('');
  show(body);
  const held = document.activeElement === at('generate');
  busy(true);
  if (held) at('cancel').focus();
  say('Drawing');
  at('running').scrollIntoView({ block: 'nearest' });
  try {
    const images = await draw(body, key(), { progress, preview }, drawing.signal);
    const { num_images: _, seed: __, ...one } = body;
    for (const { b64, ...image } of [...images].reverse()) { // the last one comes to stand first
      await keep({ body: one, ...image, alone: images.length === 1, blob: image.flagged ? null : blobOf({ b64, type: image.type }), created: Date.now() });
    }
    const flagged = images.filter((image) => image.flagged).length;
    say(flagged ? `${flagged} of ${images.length} images were withheld by the safety checker.` : `${images.length === 1 ? 'The image is' : `${images.length} images are`} ready.`);
  } catch (error) {
    await failed(error, body);
  } finally {
    const back = document.activeElement === at('cancel');
    drawing = null;
    busy(false);
    if (back) at('generate').focus();
    state.look();
  }
}

async function failed(error, body) {
  say(explain(error));
  if (error.status === 401) {
    askForKey(key() ? explain(error) : 'The server asks for an API key.');
  } else if (error.name !== 'AbortError') {
    await keep({ body, seed: body.seed, error: { text: explain(error), requestId: error.requestId }, created: Date.now() });
  }
}

function again(record) {
  apply(record.seed === undefined ? record.body : { ...record.body, seed: record.seed });
}

function vary(record) {
  apply(record.body);
}

/** Takes a drawn image as the picture to begin with. */
async function begin(record) {
  await source.take(record.blob, 'Image ' + record.seed);
  at('prompt').focus();
  at('form').scrollIntoView({ block: 'nearest' });
}

async function apply(body) {
  const { model, prompt, ...chosen } = body;
  if (drawing) return;
  if (body.image_url) await source.restore(body.image_url);
  else source.clear();
  at('prompt').value = prompt;
  form.fill(chosen);
  const { seed } = chosen; // for this once: the next Generate draws another seed
  generate({ model, prompt, ...chosen }).then(() => { if (seed !== undefined) form.fill({ ...chosen, seed }); });
}

// ---- Ideas

function chips(place, ideas, label = (idea) => idea) {
  place.replaceChildren(...ideas.map((idea) => {
    const chip = element('button', { type: 'button', className: 'plain' }, label(idea));
    chip.addEventListener('click', () => { at('prompt').value = idea; at('prompt').focus(); });
    return chip;
  }));
}

function showIdeas(ideas) {
  at('prompt').placeholder = ideas[0];
  chips(at('ideas'), ideas);
}

/** A stand-in knows only these things: what is proposed is made of them, and all of them can be looked up. */
function learn(things, ideas) {
  if (!at('known').hidden) return;
  const named = (thing) => `${/^[aeiou]/.test(thing) ? 'an' : 'a'} ${thing}`;
  const spread = Math.max(1, Math.floor(things.length / PROPOSED));
  showIdeas((ideas ?? things.filter((_, index) => index % spread === 0).map(named)).slice(0, PROPOSED));
  chips(at('known-things'), things.map(named), (idea) => idea.replace(/^an? /, ''));
  at('known').hidden = false;
}

// ---- History

function showEmpty() {
  at('empty').hidden = gallery.size > 0 || drawing !== null;
  at('history-bar').hidden = gallery.size === 0;
  at('count').textContent = gallery.size || '';
}

async function keep(record) {
  const gone = await history.add(record);
  for (const id of gone) gallery.remove(id);
  gallery.add(record);
  showEmpty();
}

async function remove(record) {
  await history.remove(record.id);
  gallery.remove(record.id);
  say('Deleted.');
  showEmpty();
}

// ---- Wiring

at('form').addEventListener('submit', (event) => {
  event.preventDefault();
  const body = form && read();
  if (body) generate(body);
});
at('cancel').addEventListener('click', () => drawing?.abort());
at('reset').addEventListener('click', () => { form?.fill({}); say('Back to the defaults.'); });
at('clear').addEventListener('click', async () => {
  if (!confirm('Delete all images from this browser?')) return;
  await history.clear();
  gallery.clear();
  showEmpty();
});
document.addEventListener('keydown', (event) => {
  if (event.key === 'Enter' && (event.ctrlKey || event.metaKey) && !document.querySelector('dialog[open]')) at('form').requestSubmit();
  if (event.key === 'Escape' && !document.querySelector('dialog[open]')) drawing?.abort();
});
at('key-open').addEventListener('click', () => askForKey());
at('key-cancel').addEventListener('click', () => at('key-dialog').close());
at('key-form').addEventListener('submit', () => {
  store(KEY, at('key').value.trim(), at('key-keep').checked);
  say('The key is set.');
  state.look();
});
at('theme').addEventListener('click', () => {
  const next = { '': 'light', light: 'dark', dark: '' }[document.documentElement.dataset.theme ?? ''];
  store(THEME, next, true);
  showTheme(next);
});
showIdeas(IDEAS);
showTheme(stored(THEME));
at('parameters').open = matchMedia('(min-width: 821px)').matches; // on a phone the images come first
const state = new ServerState(at('served'), at('notice'), learn, key);
state.look();
for (const record of await history.all()) gallery.add(record);
showEmpty();
try {
  schemas = await loading;
  showForm();
} catch (error) {
  problem(`The form cannot be drawn: ${error.message}`);
}
