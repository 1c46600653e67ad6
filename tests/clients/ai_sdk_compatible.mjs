import { readFileSync } from 'node:fs';
import { createOpenAICompatible } from '@ai-sdk/openai-compatible';
import { generateImage } from 'ai';

const server = createOpenAICompatible({ name: 'server', baseURL: 'http://127.0.0.1:8000/v1' });
const model = server.imageModel('flux/srpo');

const drawn = await generateImage({
  model,
  prompt: 'a red apple',
  n: 2,
  size: '1024x768',
  providerOptions: { server: { seed: 7 } },
});
for (const image of drawn.images) console.log(image.base64);

const edited = await generateImage({ model, prompt: { text: 'a green apple', images: [readFileSync('apple.png')] } });
console.log(edited.image.base64);
