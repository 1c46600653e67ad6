// One request, watched: server-sent events where the server streams, else its plain JSON reply.

export class Refused extends Error {
  constructor(status, reply) {
    super(reply?.message ?? `The server answered ${status}.`);
    this.status = status;
    this.code = reply?.error?.code;
    this.parameter = reply?.error?.param;
    this.requestId = reply?.requestId;
  }
}

/** What a failure means to the person at the page. */
export function explain(error) {
  if (error.name === 'AbortError') return 'Cancelled. Nothing was kept.';
  if (!(error instanceof Refused)) return 'The connection to the server was lost. Is it still running?';
  switch (error.status) {
    case 401: return 'The server asks for an API key, and this one is not known to it.';
    case 413: return 'The request is too large.';
    case 429: return 'The line is full. Wait a moment, then try again.';
    case 503: return `The server cannot draw right now. ${error.message}`;
    case 504: return 'The request took longer than the server allows.';
    default: return error.message;
  }
}

let streams = true; // until the server says that it does not

/** Draws `body`. `watch.progress(event)` and `watch.preview(event)` are called on the way.
 * Resolves to a list of {b64, type, width, height, seed, flagged, timings, served}. Raises `Refused`. */
export async function draw(body, key, watch, signal) {
  if (streams) {
    const response = await post({ ...body, stream: true, partial_images: 3 }, key, signal);
    if (response.ok && response.headers.get('content-type')?.startsWith('text/event-stream')) return followed(response, watch);
    if (response.ok) return plain(response);
    const refused = new Refused(response.status, await envelope(response));
    if (!['stream', 'partial_images'].includes(refused.parameter)) throw refused;
    streams = false;
  }
  const response = await post({ ...body, response_format: 'b64_json' }, key, signal);
  if (!response.ok) throw new Refused(response.status, await envelope(response));
  return plain(response);
}

function post(body, key, signal) {
  const headers = { 'content-type': 'application/json', accept: 'text/event-stream, application/json' };
  if (key) headers.authorization = `Bearer ${key}`;
  return fetch('/v1/images/generations', { method: 'POST', headers, body: JSON.stringify(body), signal });
}

const envelope = (response) => response.json().catch(() => null);

async function plain(response) {
  const reply = await response.json();
  return reply.data.map((item, index) => ({
    b64: item.b64_json, url: item.url, type: item.content_type, width: item.width, height: item.height,
    seed: reply.seed + index, flagged: reply.has_nsfw_concepts[index], timings: reply.timings,
    served: response.headers.get('x-served-model'),
  }));
}

async function followed(response, watch) {
  const images = [];
  const served = response.headers.get('x-served-model');
  for await (const [name, data] of events(response.body)) {
    if (name === 'error') throw new Refused(data.statusCode ?? 500, data);
    if (name === 'image_generation.progress') watch.progress(data);
    if (name === 'image_generation.partial_image') watch.preview(data);
    if (name === 'image_generation.completed') {
      images.push({ b64: data.b64_json, type: data.content_type, width: data.width, height: data.height,
        seed: data.seed, flagged: data.has_nsfw_concepts, timings: data.timings, served });
    }
  }
  if (!images.length) throw new Error('the stream ended early');
  return images;
}

/** The events of a text/event-stream body, as [name, data]. */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let text = '';
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    text += value;
    const parts = text.split('\n\n');
    text = parts.pop();
    for (const part of parts) {
      const lines = part.split('\n');
      const name = lines.find((line) => line.startsWith('event:'))?.slice(6).trim();
      const data = lines.filter((line) => line.startsWith('data:')).map((line) => line.slice(5)).join('\n');
      if (name && data) yield [name, JSON.parse(data)];
    }
  }
}

export function blobOf(image) {
  const bytes = Uint8Array.from(atob(image.b64), (letter) => letter.charCodeAt(0));
  return new Blob([bytes], { type: image.type });
}
