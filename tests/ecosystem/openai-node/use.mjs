// The official client for JavaScript: completions, chat, streams, a form, an abort, a refusal, overload, and models.
import assert from "node:assert/strict";
import OpenAI, { BadRequestError, RateLimitError } from "openai";

const client = new OpenAI({ baseURL: process.env.BASE_URL, apiKey: process.env.API_KEY });
const model = process.env.MODEL;
const messages = [
  { role: "system", content: "A play." },
  { role: "user", content: "Who goes there?" },
];

// A completion, and the same as a stream.
const whole = await client.completions.create({ model, prompt: "ROMEO:", max_tokens: 40, seed: 7 });
let text = "";
for await (const chunk of await client.completions.create({ model, prompt: "ROMEO:", max_tokens: 40, seed: 7, stream: true }))
  text += chunk.choices[0].text;
assert.equal(text, whole.choices[0].text);
assert.equal(whole.usage.completion_tokens, 40);

// A form: JSON of a schema.
const schema = {
  type: "object",
  properties: { speaker: { enum: ["ROMEO", "JULIET"] }, aside: { type: "boolean" } },
  required: ["speaker", "aside"],
  additionalProperties: false,
};
const line = await client.chat.completions.parse({
  model: process.env.FORMS_MODEL,
  messages,
  max_tokens: 100,
  response_format: { type: "json_schema", json_schema: { name: "line", strict: true, schema } },
});
const said = JSON.parse(line.choices[0].message.content);
assert.equal(typeof said.aside, "boolean");
assert.ok(["ROMEO", "JULIET"].includes(said.speaker));

// A chat, and the same as a stream.
const chat = await client.chat.completions.create({ model, messages, max_completion_tokens: 40, seed: 7 });
text = "";
for await (const chunk of await client.chat.completions.create({ model, messages, max_completion_tokens: 40, seed: 7, stream: true }))
  text += chunk.choices[0]?.delta.content ?? "";
assert.ok(text);
assert.equal(text, chat.choices[0].message.content);
const final = await client.chat.completions.stream({ model, messages, max_completion_tokens: 40, seed: 7 }).finalContent();
assert.equal(final, text);

// A stream that its reader leaves, and a request that is aborted before its answer: the server serves the next one.
const long = { model, prompt: "ROMEO:", max_tokens: 10_000_000, stream: true };
const patiently = () => client.completions.create(long, { maxRetries: 8 }); // streams that were left end a little later
for await (const chunk of await client.completions.create(long)) break;
await assert.rejects(client.completions.create({ ...long, stream: false, n: 8 }, { signal: AbortSignal.timeout(200) }));
assert.ok((await client.completions.create({ model, prompt: "ROMEO:", max_tokens: 1 })).choices[0].text);

// Refusals have the client's own types.
await assert.rejects(client.completions.create({ model, prompt: "ROMEO:", max_tokens: -1 }), (error) => {
  assert.ok(error instanceof BadRequestError);
  assert.equal(error.param, "max_tokens");
  return true;
});

// Overload: one key may have four streams here. A fifth is refused, and served once a stream has ended.
const streams = [];
for (let number = 0; number < 4; number++) streams.push(await patiently());
await assert.rejects(client.completions.create(long, { maxRetries: 0 }), (error) => {
  assert.ok(error instanceof RateLimitError);
  assert.ok(Number(error.headers.get("retry-after")) >= 1);
  return true;
});
streams.pop().controller.abort();
streams.push(await patiently());
for (const each of streams) each.controller.abort();

// Models are listed by the name that requests use.
const names = [];
for await (const each of client.models.list()) names.push(each.id);
assert.ok(names.includes(model), `${model} is not among ${names}`);
console.log("ok");
