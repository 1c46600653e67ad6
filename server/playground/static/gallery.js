// The images: a card for each, newest first, with what can be done with it.

import { blobOf } from './client.js';
import { element } from './form.js';
import { copy, LANGUAGES } from './snippets.js';

const ENDING = { 'image/jpeg': 'jpeg', 'image/png': 'png', 'image/webp': 'webp' };
const DROPPED = 'withheld by the safety checker';

function button(label, act, about) {
  const made = element('button', { type: 'button', className: 'plain' }, label);
  if (about) made.setAttribute('aria-label', about);
  made.addEventListener('click', act);
  return made;
}

function facts(record) {
  const rows = [['Seed', record.seed]];
  if (record.width) rows.push(['Size', `${record.width} × ${record.height}`]);
  if (record.timings?.inference) rows.push(['Time', `${record.timings.inference.toFixed(1)} s`]);
  if (record.served) rows.push(['Drawn by', record.served]);
  return element('dl', { className: 'facts' },
    ...rows.filter(([, value]) => value !== undefined)
      .map(([name, value]) => element('div', {}, element('dt', {}, name), element('dd', {}, String(value)))));
}

function told(kind, headline, text, detail) {
  const box = element('div', { className: `told ${kind}` }, element('strong', {}, headline), element('p', {}, text));
  if (detail) box.append(element('p', { className: 'help' }, detail));
  return box;
}

export class Gallery {
  #cards = new Map();
  #addresses = new Map(); // object URLs, given back when a card goes

  /** `act` has again(record), vary(record), begin(record), remove(record), say(text), key(). */
  constructor(place, large, act) {
    this.place = place;
    this.large = large;
    this.act = act;
    document.getElementById('large-close').addEventListener('click', () => large.close());
    large.addEventListener('click', (event) => { if (event.target === large) large.close(); });
  }

  get size() {
    return this.#cards.size;
  }

  add(record) {
    const card = element('article', { className: 'card', 'aria-label': `${record.error ? 'Failed' : 'Image'}: ${record.body.prompt}` });
    card.append(this.#picture(record), element('div', { className: 'body' },
      element('p', { className: 'prompt', title: record.body.prompt }, record.body.prompt), facts(record), this.#actions(record)));
    if (record.alone && !record.flagged) card.classList.add('alone');
    this.#cards.set(record.id, card);
    this.place.prepend(card);
  }

  remove(id) {
    this.#cards.get(id)?.remove();
    this.#cards.delete(id);
    URL.revokeObjectURL(this.#addresses.get(id));
    this.#addresses.delete(id);
  }

  clear() {
    for (const id of [...this.#cards.keys()]) this.remove(id);
  }

  #picture(record) {
    if (record.error) {
      return told('', 'Not drawn', record.error.text, record.error.requestId && `Request ${record.error.requestId}: the server's log has more under this id.`);
    }
    if (record.flagged) {
      return told('withheld', `Image ${DROPPED}`,
        'The checker took the finished picture for adult content, so the server sent a black image in its place. '
        + 'It can be wrong: another seed or a plainer wording often passes.');
    }
    const source = URL.createObjectURL(record.blob ?? blobOf(record));
    this.#addresses.set(record.id, source);
    const open = element('button', { type: 'button', className: 'open', 'aria-label': `Enlarge: ${record.body.prompt}` },
      element('img', { src: source, alt: record.body.prompt, width: record.width, height: record.height }));
    open.style.setProperty('--ratio', record.width / record.height);
    open.addEventListener('click', () => {
      Object.assign(this.large.querySelector('img'), { src: source, alt: record.body.prompt });
      this.large.showModal();
    });
    return open;
  }

  #actions(record) {
    const box = element('div', { className: 'actions' });
    if (record.error) {
      box.append(button('Try again', () => this.act.again(record)));
    } else {
      box.append(button('Same seed again', () => this.act.again(record)), button('Vary', () => this.act.vary(record), 'Vary: the same with another seed'),
        this.#copying(record));
      if (!record.flagged) box.append(button('Use as input', () => this.act.begin(record), 'Use as input: begin with this picture'), this.#download(record));
    }
    box.append(button('Delete', () => this.act.remove(record), 'Delete from the history'));
    return box;
  }

  #copying(record) {
    const choices = element('div', {});
    const menu = element('details', { className: 'copy' }, element('summary', { className: 'plain' }, 'Copy as …'), choices);
    for (const [language, write] of Object.entries(LANGUAGES)) {
      choices.append(button(language, async () => {
        const body = { ...record.body, seed: record.seed };
        await copy(write(body, `${location.origin}/v1/images/generations`, this.act.key()));
        this.act.say(`Copied as ${language}.`);
        menu.querySelector('summary').textContent = 'Copied';
        setTimeout(() => { menu.querySelector('summary').textContent = 'Copy as …'; }, 2000);
        menu.open = false;
      }, `Copy as ${language}`));
    }
    return menu;
  }

  #download(record) {
    return element('a', { className: 'plain', href: this.#addresses.get(record.id), download: `srpo-${record.seed}.${ENDING[record.type] ?? 'png'}` }, 'Save');
  }
}
