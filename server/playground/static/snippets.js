// A request as code to paste elsewhere. The key itself is never written down.

const PICTURE = 'PICTURE'; // stands for the source picture, which is read from a file beside the code

/** The body without the source's bytes, and the file's type and name. */
function withoutPicture(body) {
  const type = /^data:image\/(\w+);/.exec(body.image_url ?? '')?.[1];
  return type ? [{ ...body, image_url: PICTURE }, `data:image/${type};base64,`, `picture.${type}`] : [body];
}

const indent = (text, by) => text.replaceAll('\n', `\n${' '.repeat(by)}`);

function curl(whole, url, key) {
  const [body, start, file] = withoutPicture(whole);
  const text = JSON.stringify(body, null, 2);
  const auth = key ? '  -H "Authorization: Bearer $SRPO_API_KEY" \\\n' : '';
  const head = `curl ${url} \\\n  -H 'Content-Type: application/json' \\\n${auth}  -d `;
  if (!file) return `${head}'${text.replaceAll("'", String.raw`'\''`)}'\n`;
  const escaped = text.replace(/[\\$`]/g, String.raw`\$&`); // too long for an argument: the shell writes it to curl
  return `${head}@- <<END\n${escaped.replace(`"image_url": "${PICTURE}"`, () => `"image_url": "${start}$(base64 < ${file} | tr -d '\\n')"`)}\nEND\n`;
}

function literal(value) { // a JSON value as Python
  if (value === null) return 'None';
  if (typeof value === 'boolean') return value ? 'True' : 'False';
  if (typeof value !== 'object') return JSON.stringify(value);
  return `{${Object.entries(value).map(([name, part]) => `"${name}": ${literal(part)}`).join(', ')}}`;
}

function python(whole, url, key) {
  const [body, start, file] = withoutPicture(whole);
  const read = `"${start}" + base64.b64encode(open("${file}", "rb").read()).decode()`;
  const fields = Object.entries(body).map(([name, value]) => `        "${name}": ${file && name === 'image_url' ? read : literal(value)},\n`).join('');
  const auth = key ? '    headers={"Authorization": f"Bearer {os.environ[\'SRPO_API_KEY\']}"},\n' : '';
  const modules = `${file ? 'import base64\n' : ''}${key ? 'import os\n' : ''}`;
  return `${modules}${modules && '\n'}import requests\n\nreply = requests.post(\n    "${url}",\n${auth}    json={\n${fields}    },\n)\nreply.raise_for_status()\nprint(reply.json()["images"][0]["url"])\n`;
}

function javascript(whole, url, key) {
  const [body, start, file] = withoutPicture(whole);
  const read = `'${start}' + readFileSync('${file}').toString('base64')`;
  const text = indent(JSON.stringify(body, null, 2), 2).replace(`"image_url": "${PICTURE}"`, () => `"image_url": ${read}`);
  const auth = key ? "\n    Authorization: `Bearer ${process.env.SRPO_API_KEY}`," : '';
  const modules = file ? "import { readFileSync } from 'node:fs';\n\n" : '';
  return `${modules}const reply = await fetch('${url}', {\n  method: 'POST',\n  headers: {\n    'Content-Type': 'application/json',${auth}\n  },\n  body: JSON.stringify(${text}),\n});\nif (!reply.ok) throw new Error((await reply.json()).message);\nconsole.log((await reply.json()).images[0].url);\n`;
}

export const LANGUAGES = { curl, Python: python, JavaScript: javascript };

export async function copy(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const box = document.createElement('textarea'); // plain http beyond this machine has no clipboard object
  box.value = text;
  document.body.append(box);
  box.select();
  document.execCommand('copy');
  box.remove();
}
