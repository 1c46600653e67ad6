// A request as code to paste elsewhere. The key itself is never written down.

const indent = (text, by) => text.replaceAll('\n', `\n${' '.repeat(by)}`);

function curl(body, url, key) {
  const quoted = JSON.stringify(body, null, 2).replaceAll("'", String.raw`'\''`);
  const auth = key ? '  -H "Authorization: Bearer $SRPO_API_KEY" \\\n' : '';
  return `curl ${url} \\\n  -H 'Content-Type: application/json' \\\n${auth}  -d '${quoted}'\n`;
}

function literal(value) { // a JSON value as Python
  if (value === null) return 'None';
  if (typeof value === 'boolean') return value ? 'True' : 'False';
  if (typeof value !== 'object') return JSON.stringify(value);
  return `{${Object.entries(value).map(([name, part]) => `"${name}": ${literal(part)}`).join(', ')}}`;
}

function python(body, url, key) {
  const fields = Object.entries(body).map(([name, value]) => `        "${name}": ${literal(value)},\n`).join('');
  const auth = key ? '    headers={"Authorization": f"Bearer {os.environ[\'SRPO_API_KEY\']}"},\n' : '';
  return `${key ? 'import os\n\n' : ''}import requests\n\nreply = requests.post(\n    "${url}",\n${auth}    json={\n${fields}    },\n)\nreply.raise_for_status()\nprint(reply.json()["images"][0]["url"])\n`;
}

function javascript(body, url, key) {
  const auth = key ? "\n    Authorization: `Bearer ${process.env.SRPO_API_KEY}`," : '';
  return `const reply = await fetch('${url}', {\n  method: 'POST',\n  headers: {\n    'Content-Type': 'application/json',${auth}\n  },\n  body: JSON.stringify(${indent(JSON.stringify(body, null, 2), 2)}),\n});\nif (!reply.ok) throw new Error((await reply.json()).message);\nconsole.log((await reply.json()).images[0].url);\n`;
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
