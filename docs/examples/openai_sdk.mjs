// Draw a picture with OpenAI's SDK. What OpenAI's API does not have stands beside the other fields.
import { writeFile } from 'node:fs/promises';
import OpenAI from 'openai';

const url = process.env.SRPO_URL ?? 'http://127.0.0.1:8000';
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: process.env.SRPO_KEY ?? 'none' });

const reply = await client.images.generate({
  model: 'flux/srpo',
  prompt: 'a sunflower',
  size: '512x512',
  response_format: 'b64_json',
  seed: 7,
});
await writeFile('sunflower.jpeg', Buffer.from(reply.data[0].b64_json, 'base64'));
console.log('sunflower.jpeg');
