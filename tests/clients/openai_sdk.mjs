import { createReadStream } from 'node:fs';
import OpenAI from 'openai';

const client = new OpenAI({ baseURL: 'http://127.0.0.1:8000/v1', apiKey: 'not needed on loopback' });
for await (const model of client.models.list()) console.log(model.id);

const drawn = await client.images.generate({ model: 'flux/srpo', prompt: 'a red apple', n: 2, size: '1024x768' });
for (const image of drawn.data) console.log(image.url);

const edited = await client.images.edit({
  model: 'flux/srpo',
  prompt: 'a green apple',
  image: createReadStream('apple.png'),
});
console.log(edited.data[0].url);
