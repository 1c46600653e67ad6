import { DallEAPIWrapper } from '@langchain/openai';

const tool = new DallEAPIWrapper({
  model: 'flux/srpo',
  apiKey: 'not needed on loopback',
  baseUrl: 'http://127.0.0.1:8000/v1',
  size: '1024x1792',
});
console.log(await tool.invoke('a red apple'));
