// n8n's OpenAI node without its editor: the node's own code and n8n's own requests, with the parameters that a user
// would set in a form. The credential's Base URL is the server's.
import { readFileSync } from 'node:fs';
import { createRequire } from 'node:module';
import { dirname, join } from 'node:path';

const require = createRequire(import.meta.url);
require('reflect-metadata');
const folder = (name) => join(dirname(require.resolve(`${name}/package.json`)), 'dist');
const images = join(folder('@n8n/n8n-nodes-langchain'), 'nodes/vendors/OpenAi/v2/actions/image');
const requests = join(folder('n8n-core'), 'execution-engine/node-execution-context/utils/request-helpers/index.js');
const { getRequestHelperFunctions } = require(requests);

const credential = { url: 'http://127.0.0.1:8000/v1', apiKey: 'not needed on loopback' };
const node = { name: 'OpenAI', type: 'openAi', typeVersion: 2.3, parameters: {} };
const credentialsHelper = {
  getParentTypes: () => [],
  preAuthentication: async () => undefined,
  authenticate: async ({ apiKey }, type, options) => ({
    ...options,
    headers: { ...options.headers, Authorization: `Bearer ${apiKey}` },
  }),
};

async function run(operation, parameters) {
  const context = {
    getNode: () => node,
    getCredentials: async () => credential,
    getNodeParameter: (name, index, otherwise) => parameters[name] ?? otherwise,
    helpers: {
      ...getRequestHelperFunctions({}, node, { credentialsHelper }),
      assertBinaryData: () => ({ fileName: 'apple.png', mimeType: 'image/png' }),
      getBinaryDataBuffer: async () => readFileSync('apple.png'),
      binaryToBuffer: async (content) => content,
      prepareBinaryData: async (content) => ({ data: content.toString('base64') }),
    },
  };
  const items = await require(join(images, `${operation}.operation.js`)).execute.call(context, 0);
  for (const item of items) console.log(item.binary?.data.data ?? item.json.url);
}

await run('generate', { modelId: 'gpt-image-1', prompt: 'a red apple', options: { size: '1024x1536', n: 1 } });
await run('generate', { modelId: 'flux/srpo', prompt: 'a red apple', options: { returnImageUrls: true } });
await run('edit', { modelId: 'gpt-image-1', prompt: 'a green apple', options: {} });
