import assert from "node:assert";
import { readFileSync } from "node:fs";
import OpenAI from "openai";

const client = new OpenAI({ baseURL: `${process.argv[2]}/v1`, apiKey: "any" });
const picture = readFileSync(0, "utf8");
const ask = (text) => [
  { role: "user", content: [{ type: "image_url", image_url: { url: picture } }, { type: "text", text }] },
];
const given = { model: "demo", temperature: 0, max_tokens: 32, messages: ask("What is in the picture?") };

const whole = await client.chat.completions.create(given);
assert.match(whole.choices[0].message.content, /penguin/);
assert.equal(whole.choices[0].finish_reason, "stop");
assert.equal(whole.usage.total_tokens, whole.usage.prompt_tokens + whole.usage.completion_tokens);

let streamed = "";
let usage = null;
for await (const chunk of await client.chat.completions.create({ ...given, stream: true, stream_options: { include_usage: true } })) {
  streamed += chunk.choices[0]?.delta.content ?? "";
  usage = chunk.usage ?? usage;
}
assert.equal(streamed, whole.choices[0].message.content);
assert.equal(usage.total_tokens, whole.usage.total_tokens);

const schema = { type: "object", properties: { count: { type: "integer", minimum: 0, maximum: 9 } }, required: ["count"], additionalProperties: false };
const json = await client.chat.completions.create({
  ...given,
  max_tokens: 100,
  messages: ask("How many animals are there?"),
  response_format: { type: "json_schema", json_schema: { name: "answer", schema, strict: true } },
});
assert.ok(Number.isInteger(JSON.parse(json.choices[0].message.content).count));

const called = await client.chat.completions.create({
  ...given,
  max_tokens: 100,
  tools: [{ type: "function", function: { name: "report", parameters: schema } }],
  tool_choice: "required",
  parallel_tool_calls: false,
});
assert.equal(called.choices[0].message.tool_calls[0].function.name, "report");

const request = {
  model: "demo",
  temperature: 0,
  max_output_tokens: 32,
  input: [{ role: "user", content: [{ type: "input_image", image_url: picture, detail: "auto" }, { type: "input_text", text: "What is in the picture?" }] }],
};
const response = await client.responses.create(request);
assert.equal(response.status, "completed");
assert.equal(response.output_text, whole.choices[0].message.content);
assert.equal(response.usage.input_tokens, whole.usage.prompt_tokens);
let told = "";
let completed = null;
for await (const event of await client.responses.create({ ...request, stream: true })) {
  if (event.type === "response.output_text.delta") told += event.delta;
  if (event.type === "response.completed") completed = event.response;
}
assert.equal(told, response.output_text);
assert.equal(completed.usage.output_tokens, response.usage.output_tokens);
const formed = await client.responses.create({
  ...request,
  max_output_tokens: 100,
  text: { format: { type: "json_schema", name: "answer", schema, strict: true } },
});
assert.ok(Number.isInteger(JSON.parse(formed.output_text).count));
const asked = await client.responses.create({
  ...request,
  max_output_tokens: 100,
  tools: [{ type: "function", name: "report", parameters: schema, strict: true }],
  tool_choice: "required",
  parallel_tool_calls: false,
});
assert.equal(asked.output.find((item) => item.type === "function_call").name, "report");
await assert.rejects(client.responses.create({ ...request, max_output_tokens: 0 }), (error) => error.status === 400 && error.param === "max_output_tokens");
await assert.rejects(client.responses.create({ ...request, previous_response_id: "resp_1" }), (error) => error.status >= 400 && error.status < 500);

const runner = client.chat.completions.stream({ ...given });
assert.match(await runner.finalContent(), /penguin/);

await assert.rejects(client.chat.completions.create({ ...given, temperature: -1 }), (error) => error.status === 400 && error.param === "temperature");
await assert.rejects(client.chat.completions.create({ ...given, model: "another" }), (error) => error.status === 404);
const models = await client.models.list();
assert.equal(models.data[0].id, "demo");
const vectors = await client.embeddings.create({ model: "demo", input: "a red circle" });
assert.ok(vectors.data[0].embedding.every((value) => Number.isFinite(value)));
