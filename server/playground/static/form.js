// The form: one field for each property of the request's schema in the server's own OpenAPI document.
// A parameter that the server gains appears here by itself, with its bounds, default and help.

const OWN_PLACE = ['model', 'prompt', 'sync_mode', 'image_url']; // the page's own business
const SLIDER_SPAN = 1000; // a wider range is typed, not slid

export function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.includes('-') || name === 'for' || name === 'role') made.setAttribute(name, value);
    else made[name] = value;
  }
  made.append(...children);
  return made;
}

const WORDS = { num_inference_steps: 'Steps', num_images: 'Images', enable_safety_checker: 'Safety checker', output_format: 'Format', jpeg: 'JPEG', png: 'PNG', webp: 'WebP' };

export function words(name) {
  const plain = WORDS[name] ?? name.replace(/_scale$/, '').replace(/(\d)_(\d)/g, '$1:$2').replaceAll('_', ' ');
  return (plain[0].toUpperCase() + plain.slice(1)).replace(/ hd$/, ' HD');
}

/** The schemas of a request's body: one that takes a picture (`image_url`), and one that does not. */
export async function loadSchemas() {
  const response = await fetch('/openapi.json');
  if (!response.ok) throw new Error(`the server's OpenAPI document: ${response.status}`);
  const document = await response.json();
  const { schema } = document.paths['/v1/images/generations'].post.requestBody.content['application/json'];
  const whole = (part) => (part.$ref ? document.components.schemas[part.$ref.split('/').pop()] : part);
  return (schema.oneOf ?? [schema]).map(whole);
}

export class Form {
  #fields = new Map();

  constructor(place, schema) {
    this.model = schema.properties.model.enum?.[0] ?? schema.properties.model.default;
    this.maxPrompt = schema.properties.prompt.maxLength;
    place.replaceChildren();
    for (const [name, part] of Object.entries(schema.properties)) {
      if (OWN_PLACE.includes(name)) continue;
      const field = kindOf(part)(name, part);
      this.#fields.set(name, { ...field, initial: part.default });
      place.append(field.node);
      field.set(part.default);
    }
    place.removeAttribute('aria-busy');
  }

  /** The fields that differ from their defaults. Raises a sentence for what cannot be sent. */
  read() {
    for (const [name, { check }] of this.#fields) {
      const wrong = check?.();
      if (wrong) throw new Error(`${words(name)}: ${wrong}`);
    }
    return this.chosen();
  }

  get names() {
    return [...this.#fields.keys()];
  }

  /** The same, whether or not it can be sent. */
  chosen() {
    const chosen = {};
    for (const [name, { get, initial }] of this.#fields) {
      const value = get();
      if (value !== undefined && JSON.stringify(value) !== JSON.stringify(initial)) chosen[name] = value;
    }
    return chosen;
  }

  fill(chosen) {
    for (const [name, { set, initial }] of this.#fields) set(name in chosen ? chosen[name] : initial);
  }
}

function kindOf(part) {
  if (part.anyOf?.some((way) => way.properties) && part.anyOf.some((way) => way.enum)) return sizeField;
  if (part.enum) return choiceField;
  if (part.type === 'boolean') return switchField;
  if (part.type === 'integer' || part.type === 'number') {
    return part.maximum - part.minimum <= SLIDER_SPAN ? sliderField : numberField;
  }
  return textField;
}

function help(name, part) {
  return element('p', { className: 'help', id: `${name}-help` }, part.description ?? '');
}

function boundsProblem(input, part) {
  if (!input.value && !input.validity.badInput) return '';
  const what = part.multipleOf > 1 ? `a multiple of ${part.multipleOf}` : part.type === 'integer' ? 'a whole number' : 'a number';
  return input.validity.valid ? '' : `expected ${what} from ${input.min} to ${input.max}`;
}

function bounded(part, properties) {
  const high = Math.min(part.maximum ?? Number.MAX_SAFE_INTEGER, Number.MAX_SAFE_INTEGER); // exact in this page
  const step = part.multipleOf ?? (part.type === 'integer' ? 1 : 'any');
  return element('input', { type: 'number', min: part.minimum ?? '', max: high, step, ...properties });
}

function sliderField(name, part) {
  const number = bounded(part, { id: name, 'aria-describedby': `${name}-help` });
  const span = part.maximum - part.minimum;
  const step = part.multipleOf ?? (part.type === 'integer' ? 1 : span > 2 ? 0.5 : 0.01);
  const slider = element('input', { type: 'range', min: part.minimum, max: part.maximum, step, 'aria-label': `${words(name)}, slider` });
  slider.addEventListener('input', () => { number.value = slider.value; });
  number.addEventListener('input', () => { slider.value = number.value; });
  const set = (value) => { number.value = slider.value = value ?? part.minimum; };
  const node = element('div', { className: 'field' }, element('label', { for: name }, words(name)),
    element('div', { className: 'pair' }, slider, number), help(name, part));
  return { node, set, get: () => (number.value ? Number(number.value) : undefined), check: () => boundsProblem(number, part) };
}

function numberField(name, part) {
  const number = bounded(part, { id: name, placeholder: 'Drawn by the server', 'aria-describedby': `${name}-help` });
  const clear = element('button', { type: 'button', className: 'plain', 'aria-label': `Empty ${words(name)}` }, 'Clear');
  clear.addEventListener('click', () => { number.value = ''; number.focus(); });
  const node = element('div', { className: 'field' }, element('label', { for: name }, words(name)),
    element('div', { className: 'with-button' }, number, clear), help(name, part));
  return { node, set: (value) => { number.value = value ?? ''; }, get: () => (number.value ? Number(number.value) : undefined), check: () => boundsProblem(number, part) };
}

function textField(name, part) {
  const input = element('input', { type: 'text', id: name, 'aria-describedby': `${name}-help` });
  if (part.maxLength) input.maxLength = part.maxLength;
  const node = element('div', { className: 'field' }, element('label', { for: name }, words(name)), input, help(name, part));
  return { node, set: (value) => { input.value = value ?? ''; }, get: () => input.value || undefined };
}

function switchField(name, part) {
  const input = element('input', { type: 'checkbox', role: 'switch', className: 'switch', id: name, 'aria-describedby': `${name}-help` });
  const node = element('div', { className: 'field' },
    element('div', { className: 'head' }, element('label', { for: name }, words(name)), input), help(name, part));
  return { node, set: (value) => { input.checked = Boolean(value); }, get: () => input.checked };
}

function radios(name, values, decorate = () => []) {
  const inputs = new Map(values.map((value) => [value, element('input', { type: 'radio', name, value })]));
  const labels = [...inputs].map(([value, input]) => element('label', {}, ...decorate(value), words(value), input));
  return { inputs, labels, chosen: () => values.find((value) => inputs.get(value).checked) };
}

function choiceField(name, part) {
  const { inputs, labels, chosen } = radios(name, part.enum);
  const node = element('fieldset', { className: 'field', 'aria-describedby': `${name}-help` },
    element('legend', {}, words(name)), element('div', { className: 'choices' }, ...labels), help(name, part));
  return { node, set: (value) => { (inputs.get(value) ?? inputs.get(part.enum[0])).checked = true; }, get: chosen };
}

// In the API's own words this is a preset or an object.
const SIZE_HELP = { description: 'A shape, or Custom for a width and a height of your own, in pixels.' };

/** Width over height of a preset, from its name. */
export function ratioOf(preset) {
  const [, long, short] = /(\d+)_(\d+)$/.exec(preset) ?? [null, 1, 1];
  return preset.startsWith('portrait') ? short / long : long / short;
}

function sizeField(name, part) {
  const presets = part.anyOf.find((way) => way.enum).enum;
  const sides = part.anyOf.find((way) => way.properties).properties;
  const outline = (value) => {
    const shape = element('span', { className: `shape ${value}`, 'aria-hidden': 'true' });
    const ratio = ratioOf(value === 'custom' ? 'square' : value);
    const large = value === 'square' ? 16 : 24; // the smaller square
    shape.style.width = `${ratio >= 1 ? large : large * ratio}px`;
    shape.style.height = `${ratio >= 1 ? large / ratio : large}px`;
    return [shape];
  };
  const { inputs, labels, chosen } = radios(name, [...presets, 'custom'], outline);
  const numbers = Object.entries(sides).map(([side, bounds]) => [side, bounded(bounds, { value: bounds.default }), bounds]);
  const custom = element('div', { className: 'sides', hidden: true },
    ...numbers.map(([side, input]) => element('label', {}, words(side), input)));
  const node = element('fieldset', { className: 'field', 'aria-describedby': `${name}-help` }, element('legend', {}, words(name)),
    element('div', { className: 'choices shapes' }, ...labels), custom, help(name, SIZE_HELP));
  const show = () => { custom.hidden = chosen() !== 'custom'; };
  node.addEventListener('change', show);
  const set = (value) => {
    inputs.get(typeof value === 'string' ? value : 'custom').checked = true;
    if (typeof value === 'object') for (const [side, input] of numbers) input.value = value[side];
    show();
  };
  const get = () => (chosen() === 'custom' ? Object.fromEntries(numbers.map(([side, input]) => [side, Number(input.value)])) : chosen());
  const check = () => (chosen() === 'custom' ? numbers.map(([, input, bounds]) => (input.value ? boundsProblem(input, bounds) : 'enter a number')).find(Boolean) : '');
  return { node, set, get, check };
}
