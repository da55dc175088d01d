// The Vercel AI SDK: completion and chat, whole and streamed.
import assert from "node:assert/strict";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { createOpenAI } from "@ai-sdk/openai";
import { embed, generateText, streamText } from "ai";

const name = process.env.MODEL;
const settings = { baseURL: process.env.BASE_URL, apiKey: process.env.API_KEY };
const compatible = createOpenAICompatible({ name: "gru-serve", includeUsage: true, ...settings });
const openai = createOpenAI(settings);
const options = { maxOutputTokens: 40, seed: 7, maxRetries: 0 };

for (const model of [compatible.completionModel(name), openai.completion(name), compatible.chatModel(name), openai.chat(name)]) {
  const whole = await generateText({ model, prompt: "Who goes there?", ...options });
  assert.ok(whole.text, `${model.provider}: no text`);
  assert.ok(["stop", "length"].includes(whole.finishReason));
  assert.ok(whole.usage.outputTokens > 0 && whole.usage.outputTokens <= 40);
  const stream = streamText({ model, prompt: "Who goes there?", ...options, onError: ({ error }) => { throw error; } });
  let text = "";
  for await (const piece of stream.textStream) text += piece;
  assert.equal(text, whole.text, `${model.provider}: the stream differs from the whole answer`);
  assert.ok((await stream.usage).outputTokens > 0);
}
const messages = [
  { role: "user", content: "Who goes there?" },
  { role: "assistant", content: "A friend." },
  { role: "user", content: [{ type: "text", text: "What friend?" }] },
];
assert.ok((await generateText({ model: compatible.chatModel(name), system: "A play.", messages, ...options })).text);

// A reader that leaves.
const left = new AbortController();
const long = streamText({ model: compatible.completionModel(name), prompt: "ROMEO:", maxOutputTokens: 8000, abortSignal: left.signal });
for await (const piece of long.textStream) { left.abort(); break; }
const { embedding } = await embed({ model: compatible.embeddingModel(name), value: "ROMEO:" });
assert.ok(Math.abs(Math.hypot(...embedding) - 1) < 1e-3);
console.log("ok");
