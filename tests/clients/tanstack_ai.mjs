import { readFileSync } from 'node:fs';
import { generateImage } from '@tanstack/ai';
import { createOpenaiImage } from '@tanstack/ai-openai';

const adapter = createOpenaiImage('flux/srpo', 'not needed on loopback', { baseURL: 'http://127.0.0.1:8000/v1' });
const apple = { type: 'image', source: { type: 'data', mimeType: 'image/png', value: readFileSync('apple.png', 'base64') } };
for (const prompt of ['a red apple', [{ type: 'text', content: 'a green apple' }, apple]]) {
  const { images } = await generateImage({ adapter, prompt, modelOptions: { quality: 'high' } });
  for (const image of images) console.log(image.url ?? image.b64Json);
}
