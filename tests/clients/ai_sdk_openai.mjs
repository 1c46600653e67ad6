import { readFileSync } from 'node:fs';
import { createOpenAI } from '@ai-sdk/openai';
import { generateImage } from 'ai';

const server = createOpenAI({ baseURL: 'http://127.0.0.1:8000/v1', apiKey: 'not needed on loopback' });
const model = server.imageModel('flux/srpo');

const drawn = await generateImage({ model, prompt: 'a red apple', size: '1024x768' });
console.log(drawn.image.base64);

const edited = await generateImage({ model, prompt: { text: 'a green apple', images: [readFileSync('apple.png')] } });
console.log(edited.image.base64);
