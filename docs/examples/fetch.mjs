// Draw a picture and save it, without a package.
import { writeFile } from 'node:fs/promises';

const url = process.env.SRPO_URL ?? 'http://127.0.0.1:8000';
const response = await fetch(`${url}/v1/images/generations`, {
  method: 'POST',
  headers: { 'Content-Type': 'application/json', Authorization: `Bearer ${process.env.SRPO_KEY ?? 'none'}` },
  body: JSON.stringify({ model: 'flux/srpo', prompt: 'a panda', image_size: 'square', seed: 7 }),
});
const reply = await response.json();
if (!response.ok) throw new Error(`${response.status} ${reply.error.code}: ${reply.message}`);

const image = await fetch(reply.images[0].url);
await writeFile('panda.jpeg', Buffer.from(await image.arrayBuffer()));
console.log('panda.jpeg');
