// One request through one client. Argument: JSON with client, url, key, maxRetries and fields.
// Prints JSON: {images: [{url} or {b64}]}, or {error: {name, status, message}}.
import { createReadStream } from 'node:fs';
import OpenAI from 'openai';
import { createOpenAI } from '@ai-sdk/openai';
import { createOpenAICompatible } from '@ai-sdk/openai-compatible';
import { APICallError, RetryError, generateImage } from 'ai';

const { client, url, key, maxRetries, fields } = JSON.parse(process.argv[2]);
const { model, prompt, size, n, ...more } = fields;

async function withOpenAI() {
  const openai = new OpenAI({ baseURL: url, apiKey: key, maxRetries });
  const reply = await openai.images.generate(fields);
  return reply.data.map((item) => ({ url: item.url, b64: item.b64_json }));
}

async function stream() {
  const openai = new OpenAI({ baseURL: url, apiKey: key, maxRetries });
  const events = [];
  for await (const event of await openai.images.generate({ ...fields, stream: true })) {
    events.push({ type: event.type, b64: event.b64_json, index: event.partial_image_index });
  }
  return events;
}

async function edit() {
  const openai = new OpenAI({ baseURL: url, apiKey: key, maxRetries });
  const { file, ...rest } = fields;
  const reply = await openai.images.edit({ image: createReadStream(file), ...rest });
  if (!rest.stream) return reply.data.map((item) => ({ url: item.url, b64: item.b64_json }));
  const events = [];
  for await (const event of reply) events.push({ type: event.type, b64: event.b64_json });
  return events;
}

async function models() {
  const ids = [];
  for await (const card of new OpenAI({ baseURL: url, apiKey: key, maxRetries }).models.list()) ids.push(card.id);
  return ids;
}

async function withAI(provider) {
  const reply = await generateImage({
    model: provider.imageModel(model),
    prompt,
    size,
    n,
    maxRetries,
    providerOptions: { server: more },
  });
  return reply.images.map((image) => ({ b64: image.base64 }));
}

const clients = {
  openai: withOpenAI,
  stream,
  edit,
  models,
  'ai, openai': () => withAI(createOpenAI({ baseURL: url, apiKey: key })),
  'ai, compatible': () => withAI(createOpenAICompatible({ name: 'server', baseURL: url, apiKey: key })),
};

function shown(error) {
  const last = RetryError.isInstance(error) ? error.lastError : error;
  const status = APICallError.isInstance(last) ? last.statusCode : last.status;
  return { name: last.constructor.name, status, message: error.message };
}

const outcome = await clients[client]().then(
  (images) => ({ images }),
  (error) => ({ error: shown(error) }),
);
console.log(JSON.stringify(outcome));
