// LobeHub without its web application: its own image code, bundled from the sources that it publishes on npm. What the
// bundle does not find is used by other parts of LobeHub only.
import { existsSync, mkdirSync, readdirSync, readFileSync, symlinkSync } from 'node:fs';
import { createRequire } from 'node:module';
import { dirname, join } from 'node:path';

const require = createRequire(import.meta.url);
const { build } = require('esbuild');
const modules = dirname(dirname(require.resolve('esbuild/package.json')));
const sources = join(dirname(modules), 'sources', 'package');
for (const folder of ['packages', 'packages/business']) {
  for (const name of readdirSync(join(sources, folder))) {
    const manifest = join(sources, folder, name, 'package.json');
    if (!existsSync(manifest)) continue;
    const link = join(modules, JSON.parse(readFileSync(manifest)).name);
    mkdirSync(dirname(link), { recursive: true });
    if (!existsSync(link)) symlinkSync(dirname(manifest), link);
  }
}

await build({
  entryPoints: [join(sources, 'packages/model-runtime/src/providers/openai/index.ts')],
  outfile: 'lobehub-image.cjs',
  bundle: true,
  platform: 'node',
  logLevel: 'silent',
  plugins: [
    {
      name: 'leave-out',
      setup({ onResolve, resolve }) {
        onResolve({ filter: /^[^./]/ }, async ({ path, kind, resolveDir, pluginData }) => {
          if (pluginData === 'asked') return;
          const found = await resolve(path, { kind, resolveDir, pluginData: 'asked' });
          return { ...(found.errors.length ? { path, external: true } : found), sideEffects: false };
        });
      },
    },
  ],
});
const { LobeOpenAI } = require('./lobehub-image.cjs');

const runtime = new LobeOpenAI({ apiKey: 'not needed on loopback', baseURL: 'http://127.0.0.1:8000/v1' });
const apple = `data:image/png;base64,${readFileSync('apple.png').toString('base64')}`;
for (const params of [
  { prompt: 'a red apple', size: '1024x1536', seed: 7, cfg: 4, steps: 20 },
  { prompt: 'a green apple', imageUrl: apple, size: 'auto' },
  { prompt: 'two apples', imageUrls: [apple, apple] },
]) {
  const { imageUrl } = await runtime.createImage({ model: 'flux/srpo', params });
  console.log(imageUrl);
}
