import assert from "node:assert";
import { readFileSync } from "node:fs";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, Output, streamText } from "ai";
import { z } from "zod";

const provider = createOpenAICompatible({ name: "opsin", baseURL: `${process.argv[2]}/v1`, supportsStructuredOutputs: true });
const model = provider("demo");
const image = readFileSync(0, "utf8");
const messages = [{ role: "user", content: [{ type: "file", mediaType: "image/png", data: image }, { type: "text", text: "What is in the picture?" }] }];

const whole = await generateText({ model, messages, temperature: 0 });
assert.match(whole.text, /penguin/);
assert.ok(whole.usage.inputTokens > 256);

const failures = [];
const stream = streamText({ model, messages, temperature: 0, onError: ({ error }) => failures.push(error) });
let text = "";
for await (const piece of stream.textStream) text += piece;
assert.deepEqual(failures, []);
assert.equal(text, whole.text);

const schema = z.object({ animals: z.array(z.enum(["cat", "dog", "elephant", "penguin"])).max(4) });
const { output } = await generateText({ model, messages, output: Output.object({ schema }) });
assert.ok(Array.isArray(output.animals));
