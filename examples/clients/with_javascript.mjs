// The JavaScript `openai` package in front of Sluice: only the base URL and the key are changed.
// Ends with status 1 at the first thing that is not as it should be.
import assert from "node:assert/strict";
import OpenAI from "openai";

const base = process.env.GATEWAY ?? "http://127.0.0.1:8000";
const route = process.env.ROUTE ?? "review-triage";
const client = new OpenAI({ baseURL: `${base}/v1`, apiKey: process.env.KEY });
const messages = [{ role: "user", content: "It broke on day one." }];
const schema = {
  type: "object",
  properties: { sentiment: { enum: ["positive", "negative", "neutral"] } },
  required: ["sentiment"],
  additionalProperties: false,
};

async function models() {
  const names = [];
  for await (const model of client.models.list()) names.push(model.id);
  assert.ok(names.includes(route) && names.includes(`${route}@1`));
  assert.equal((await client.models.retrieve(`${route}@1`)).id, `${route}@1`);
}

async function chat() {
  const { data, response } = await client.chat.completions
    .create(
      { model: route, messages, max_completion_tokens: 8, n: 2, seed: 7, logprobs: true },
      { headers: { "x-sluice-session": "ticket-4711", "x-request-id": "js-1" } },
    )
    .withResponse();
  assert.equal(data.choices.length, 2);
  assert.equal(data._request_id, "js-1");
  assert.equal(response.headers.get("x-sluice-route"), route);
  console.log(`  ${response.headers.get("x-sluice-version")}: ${data.choices[0].message.content}`);
}

async function stream() {
  const chunks = [];
  const options = { model: route, messages, max_tokens: 8, stream: true };
  for await (const chunk of await client.chat.completions.create({
    ...options,
    stream_options: { include_usage: true },
  }))
    chunks.push(chunk);
  assert.ok(chunks.at(-1).usage.completion_tokens > 0);
  // Whoever has not asked for its usage does not get it.
  for await (const chunk of await client.chat.completions.create(options))
    assert.ok(chunk.choices.length === 1 && !chunk.usage);
}

async function cancel() {
  const many = { model: route, messages, max_tokens: 300, ignore_eos: true };
  // Leaving the loop closes the connection, which ends the engine's work too.
  for await (const _ of await client.chat.completions.create({ ...many, stream: true })) break;
  await assert.rejects(
    client.chat.completions.create(many, { timeout: 100, maxRetries: 0 }),
    OpenAI.APIConnectionTimeoutError,
  );
}

async function schemas() {
  const answer = await client.chat.completions.create({
    model: route,
    messages,
    max_tokens: 40,
    response_format: { type: "json_schema", json_schema: { name: "review", schema, strict: true } },
  });
  assert.match(JSON.parse(answer.choices[0].message.content).sentiment, /positive|negative|neutral/);
}

async function tools() {
  const options = {
    model: route,
    messages,
    max_tokens: 400,
    // vLLM holds a tool to its parameters only where it is strict.
    tools: [{ type: "function", function: { name: "rate", parameters: schema, strict: true } }],
    tool_choice: { type: "function", function: { name: "rate" } },
  };
  const whole = await client.chat.completions.create(options);
  const call = whole.choices[0].message.tool_calls[0].function;
  assert.ok(call.name === "rate" && "sentiment" in JSON.parse(call.arguments));
  const streamed = await client.chat.completions.stream(options).finalChatCompletion();
  assert.equal(streamed.choices[0].message.tool_calls[0].function.name, "rate");
}

async function completions() {
  const answer = await client.completions.create({
    model: route,
    prompt: "One",
    max_tokens: 3,
    echo: true,
  });
  assert.ok(answer.choices[0].text.startsWith("One"));
}

async function responses() {
  const options = { model: route, input: "It broke on day one.", max_output_tokens: 16 };
  assert.equal((await client.responses.create(options)).object, "response");
  const types = [];
  for await (const event of await client.responses.create({ ...options, stream: true }))
    types.push(event.type);
  assert.equal(types[0], "response.created");
  assert.match(types.at(-1), /response\.(completed|incomplete)/);
}

async function errors() {
  const ask = (more) => client.chat.completions.create({ model: route, messages, ...more });
  const stranger = new OpenAI({ baseURL: `${base}/v1`, apiKey: "sk-nobody" });
  await assert.rejects(stranger.models.list(), OpenAI.AuthenticationError);
  await assert.rejects(ask({ model: "nobody" }), (error) => {
    assert.ok(error instanceof OpenAI.NotFoundError);
    assert.equal(error.code, "model_not_found");
    assert.ok(error.requestID);
    return true;
  });
  // What the engine refuses comes in its own words.
  await assert.rejects(ask({ temperature: -5 }), OpenAI.BadRequestError);
  await assert.rejects(ask({ note: "x".repeat(20 * 2 ** 20) }), (error) => error.status === 413);
}

const steps = { models, chat, stream, cancel, schemas, tools, completions, responses, errors };
for (const [name, step] of Object.entries(steps)) {
  await step();
  console.log(`ok ${name}`);
}
