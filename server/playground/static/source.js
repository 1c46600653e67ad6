// The picture to begin with: chosen, dropped, pasted, or one that was drawn here. It stays in the page until it is sent.

import { blobOf } from './client.js';

const SENT_AS_IS = ['image/png', 'image/jpeg', 'image/webp'];
const MOST_BYTES = 5_000_000; // of a file that is sent as it is; a data URI is a third longer
const LONGEST = 1536; // pixels: the largest that is drawn

function uriOf(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(blob);
  });
}

/** The same picture, no larger than the server draws. */
async function reduced(bitmap) {
  const scale = Math.min(1, LONGEST / Math.max(bitmap.width, bitmap.height));
  const canvas = new OffscreenCanvas(Math.max(1, Math.round(bitmap.width * scale)), Math.max(1, Math.round(bitmap.height * scale)));
  const context = canvas.getContext('2d');
  context.fillStyle = 'white';
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  return canvas.convertToBlob({ type: 'image/jpeg', quality: 0.95 });
}

export class Source {
  url = null; // a data URI
  ratio = 1; // width over height

  /** `parts` are input, chosen, image, name, remove and drop (elements); `told` has changed(), say(text), problem(text). */
  constructor(parts, told) {
    this.parts = parts;
    this.told = told;
    parts.input.addEventListener('change', () => { if (parts.input.files[0]) this.take(parts.input.files[0]); });
    parts.remove.addEventListener('click', () => {
      this.clear();
      this.told.say('The picture is removed.');
      parts.input.focus();
    });
    parts.drop.addEventListener('dragover', (event) => {
      if (!event.dataTransfer.types.includes('Files')) return;
      event.preventDefault();
      parts.drop.classList.add('over');
    });
    parts.drop.addEventListener('dragleave', (event) => { if (!parts.drop.contains(event.relatedTarget)) parts.drop.classList.remove('over'); });
    parts.drop.addEventListener('drop', (event) => {
      parts.drop.classList.remove('over');
      if (event.dataTransfer.files[0]) this.#given(event, event.dataTransfer.files[0]);
    });
    parts.drop.addEventListener('paste', (event) => {
      const file = [...event.clipboardData.files].find(({ type }) => type.startsWith('image/'));
      if (file) this.#given(event, file);
    });
  }

  #given(event, file) {
    event.preventDefault();
    this.take(file);
  }

  /** Begin with this file or blob. Says so, or what is wrong with it. */
  async take(blob, name = blob.name ?? 'Picture') {
    let bitmap;
    try {
      bitmap = await createImageBitmap(blob);
      const asIs = SENT_AS_IS.includes(blob.type) && blob.size <= MOST_BYTES;
      this.#show(await uriOf(asIs ? blob : await reduced(bitmap)), bitmap.width / bitmap.height, `${name}, ${bitmap.width} × ${bitmap.height}`);
      if (blob !== this.parts.input.files[0]) this.parts.input.value = '';
      this.told.problem('');
      this.told.say('The next image begins with this picture.');
    } catch {
      this.parts.input.value = '';
      this.told.problem(`${name} is not a picture that this browser can read.`);
    } finally {
      bitmap?.close();
    }
  }

  /** Begin with what an earlier request began with. */
  async restore(url) {
    const [, type, b64] = /^data:([^;,]*);base64,(.*)$/s.exec(url) ?? [];
    if (b64) await this.take(blobOf({ b64, type }), 'The same picture');
  }

  clear() {
    this.parts.input.value = '';
    this.#show(null, 1, '');
  }

  #show(url, ratio, name) {
    Object.assign(this, { url, ratio });
    this.parts.chosen.hidden = !url;
    if (url) this.parts.image.src = url;
    else this.parts.image.removeAttribute('src');
    this.parts.name.textContent = name;
    this.told.changed();
  }
}
