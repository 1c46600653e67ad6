// What serves here, and whether it is ready: said plainly, above all when a stand-in draws.

const AGAIN = 1500; // ms between two looks while the model loads
const AWAY = 5000; // ms until a server that did not answer is asked again

export class ServerState {
  #timer = 0;

  /** `learn(things, ideas)` is called with what a stand-in can draw, where that is little, and with prompts for it.
   *  `key()` is the API key, or empty. */
  constructor(line, notice, learn, key) {
    this.key = key;
    this.line = line;
    this.notice = notice;
    this.learn = learn;
  }

  async look() {
    clearTimeout(this.#timer);
    try {
      const headers = this.key() ? { authorization: `Bearer ${this.key()}` } : {}; // without one it says less
      const health = await (await fetch('/health', { headers })).json();
      const ready = health.state === 'ready';
      this.#say(ready ? 'ready' : '', ready ? served(health) : loading(health));
      const { sentences, info } = await warnings(health);
      this.#warn(sentences);
      if (info?.knows) this.learn(info.knows, info.ideas);
      if (!ready) this.#timer = setTimeout(() => this.look(), AGAIN);
    } catch {
      this.#say('down', 'The server does not answer');
      this.#timer = setTimeout(() => this.look(), AWAY);
    }
  }

  #say(state, text) {
    this.line.className = `served ${state}`;
    if (this.line.textContent !== text) this.line.textContent = text;
  }

  #warn(sentences) {
    const text = sentences.join(' ');
    this.notice.hidden = !text;
    if (this.notice.textContent !== text) this.notice.textContent = text;
  }
}

function served({ served_model: model, device }) {
  return device ? `${model} on ${device.replace(/\b1 threads/, '1 thread')}` : model;
}

function loading(health) {
  if (health.state === 'asleep') return 'Asleep: the next picture wakes the model';
  if (health.state !== 'loading' && health.state !== 'starting') return `The server is ${health.state}`;
  return `Loading ${health.served_model}: ${health.stage} ${Math.round(100 * (health.progress ?? 0))} %`;
}

async function warnings(health) {
  const sentences = [];
  let info;
  if (health.embedded) {
    const models = await (await fetch('/v1/models')).json();
    const card = models.data.find((model) => model.info?.served_by === health.served_model);
    sentences.push(`A stand-in is drawing: ${health.served_model}${card ? ` (${card.info.description})` : ''}, not FLUX with SRPO.`);
    sentences.push('For real pictures give the server the real weights: its README says how.');
    info = card?.info;
  }
  if (health.safety?.checker === 'none') sentences.push('No safety checker looks at the images.');
  return { sentences, info };
}
