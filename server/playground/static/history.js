// What was drawn, kept in this browser: the newest 60, images included. Nothing of it goes to the server.

const KEPT = 60;

export class History {
  #base = null;
  #memory = []; // where the browser keeps nothing (private windows)

  async open() {
    this.#base = await new Promise((resolve) => {
      const opening = indexedDB.open('srpo', 1);
      opening.onupgradeneeded = () => opening.result.createObjectStore('images', { keyPath: 'id', autoIncrement: true });
      opening.onsuccess = () => resolve(opening.result);
      opening.onerror = () => resolve(null);
    });
    return this;
  }

  #ask(mode, act) {
    return new Promise((resolve, reject) => {
      const asking = act(this.#base.transaction('images', mode).objectStore('images'));
      asking.onsuccess = () => resolve(asking.result);
      asking.onerror = () => reject(asking.error);
    });
  }

  /** Oldest first. */
  async all() {
    return this.#base ? this.#ask('readonly', (store) => store.getAll()) : this.#memory;
  }

  /** Keeps a record and gives it its `id`. Resolves to the ids that had to go. */
  async add(record) {
    try {
      if (!this.#base) throw new Error('no storage');
      record.id = await this.#ask('readwrite', (store) => store.add(record));
    } catch { // full, or forbidden: it stays until the page is closed
      record.id = `m${this.#memory.push(record)}-${Date.now()}`;
    }
    const gone = (await this.all()).slice(0, -KEPT).map((old) => old.id);
    for (const id of gone) await this.remove(id);
    return gone;
  }

  async remove(id) {
    this.#memory = this.#memory.filter((record) => record.id !== id);
    if (this.#base) await this.#ask('readwrite', (store) => store.delete(id));
  }

  async clear() {
    this.#memory = [];
    if (this.#base) await this.#ask('readwrite', (store) => store.clear());
  }
}
