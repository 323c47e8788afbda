// One block is one load of this page: take a job, load the runtime and the file (or those that take turns), warm up,
// time, compute the outputs, send the result, load the page anew. The rules are those of devices/agent/:
// docs/measuring.md.

const WINDOW = 10; // inferences in each of the two windows whose medians are compared
const SETTLED = 0.02; // their largest relative difference
const SETTLING_RUNS = 200; // caps of the settling, counted after the minimum warm-up
const SETTLING_MS = 5000;
const TURN_MS = 10; // a turn lasts at least this long …
const TURN_RUNS = 5; // … and this many samples: the first of a turn finds the caches full of the other file
const PROFILED_RUNS = 30;
const TIMER_SHARE = 0.02; // largest share of one sample that a step of the clock may be

// An ONNX file with one Identity.
const IDENTITY = "CAcSADo3ChAKAXgSAXkiCElkZW50aXR5EgFnWg8KAXgSCgoICAESBAoCCAFiDwoBeRIKCggIARIECgIIAUIECgAQDQ==";

const ARRAYS = {
  float32: Float32Array, float64: Float64Array, int8: Int8Array, uint8: Uint8Array, int16: Int16Array,
  uint16: Uint16Array, int32: Int32Array, uint32: Uint32Array, int64: BigInt64Array, bool: Uint8Array,
};

let hidden = document.visibilityState !== "visible";
document.addEventListener("visibilitychange", () => { hidden ||= document.visibilityState !== "visible"; });

const state = (text) => { document.getElementById("state").textContent = text; };
const median = (values) => {
  const sorted = [...values].sort((a, b) => a - b);
  const middle = sorted.length >> 1;
  return sorted.length % 2 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2;
};

// Awaiting an inference in wasm never lets the page's events in: it would not hear that it was hidden.
const channel = new MessageChannel();
let breathed = performance.now();
async function breathe() {
  if (performance.now() - breathed < 50) return;
  await new Promise((resolve) => { channel.port1.onmessage = resolve; channel.port2.postMessage(0); });
  breathed = performance.now();
}

async function send(path, body, type = "application/json") {
  const answer = await fetch(path, { method: "POST", headers: { "Content-Type": type }, body });
  if (!answer.ok) throw new Error(`${path}: ${answer.status}`);
}

async function bytes(path) {
  const answer = await fetch(path);
  if (!answer.ok) throw new Error(`${path}: ${answer.status}`);
  return answer.arrayBuffer();
}

// Smallest step that the clock was seen to make, in milliseconds.
function timerStep() {
  let smallest = Infinity;
  const end = performance.now() + 20;
  for (let before = performance.now(), after; before < end; before = after) {
    after = performance.now();
    if (after > before) smallest = Math.min(smallest, after - before);
  }
  return smallest;
}

// The runtimes tell on the console where they place nodes. They take its functions when they start, so ours come first.
let heard = null; // lines, while somebody listens
for (const name of ["debug", "info", "log", "warn", "error"]) {
  const tell = console[name].bind(console);
  console[name] = (...words) => { if (heard) heard.push(words.join(" ")); else tell(...words); };
}
const PLACEMENT = /placed on \[|Memcpy|operations will run on the|WebGPU-based API|supported by WebNN/;
const PROFILE = /^\{"cat" ?:/;

// What a runtime says on the console meanwhile, of what is wanted, and what the work returns; nothing of it is timed.
async function listening(wanted, work) {
  heard = [];
  try {
    const facts = await work();
    return { lines: heard.filter((line) => wanted.test(line)), ...facts };
  } catch (error) {
    return { error: String(error?.message ?? error) };
  } finally {
    heard = null;
  }
}

// A runtime is {name, load(side, model), place(model), profile(model, prepared)}; a loaded file is {prepare(arrays),
// run(prepared) -> outputs read back, in the order of the side's, release()}. place and profile load it once more, and
// have the runtime say where its nodes run and how long each takes; a runtime that has no profile has no such function.

async function onnxRuntime(job) {
  const isWasm = job.accelerator === "wasm";
  const ort = await import(isWasm ? "./library/ort/ort.wasm.min.mjs" : "./library/ort/ort.webgpu.min.mjs");
  ort.env.wasm.wasmPaths = new URL("./library/ort/", document.baseURI).href;
  ort.env.wasm.numThreads = job.plan.threads;
  ort.env.logLevel = "error";
  const options = { executionProviders: [job.accelerator], graphOptimizationLevel: "all" };
  // The first session starts the WebAssembly; this one holds one Identity, so that no file pays for the start.
  const nothing = Uint8Array.from(atob(IDENTITY), (letter) => letter.charCodeAt(0));
  await (await ort.InferenceSession.create(nothing, options)).release();
  return {
    name: `onnxruntime-web ${job.versions["onnxruntime-web"]}`,
    async place(model) {
      const session = await ort.InferenceSession.create(new Uint8Array(model), { ...options, logSeverityLevel: 0 });
      await session.release();
      return {};
    },
    async profile(model, prepared) {
      const session = await ort.InferenceSession.create(new Uint8Array(model), { ...options, enableProfiling: true });
      for (let i = 0; i < PROFILED_RUNS; i++) await session.run(prepared);
      session.endProfiling();
      await session.release();
      return {};
    },
    async load(side, model) {
      const session = await ort.InferenceSession.create(new Uint8Array(model), options);
      const { inputNames, outputNames } = session;
      for (const [what, wanted, found] of [["input", side.inputs, inputNames], ["output", side.outputs, outputNames]])
        for (const { name } of wanted)
          if (!found.includes(name)) throw new Error(`no ${what} called '${name}'; there are ${found.join(", ")}`);
      const names = side.outputs.map(({ name }) => name);
      return {
        release: () => session.release(),
        prepare: (arrays) => Object.fromEntries(
          side.inputs.map((spec, i) => [spec.name, new ort.Tensor(spec.dtype, arrays[i], spec.shape)]),
        ),
        async run(feeds) {
          const outputs = await session.run(feeds, names);
          const read = [];
          for (const name of names) { // getData waits for what is still on the GPU
            read.push({ dtype: outputs[name].type, shape: outputs[name].dims, data: await outputs[name].getData() });
            outputs[name].dispose();
          }
          return read;
        },
      };
    },
  };
}

async function liteRt(job) {
  const { loadLiteRt, loadAndCompile, Tensor } = await import("@litertjs/core");
  const isWasm = job.accelerator === "wasm";
  const threads = isWasm && job.plan.threads > 1;
  await loadLiteRt(new URL("./library/litert/wasm/", document.baseURI).href, isWasm ? { threads } : { jspi: true });
  const options = { accelerator: job.accelerator };
  if (threads) options.cpuOptions = { numThreads: job.plan.threads };
  const order = (details, wanted, what) => {
    const names = details.map(({ name }) => name);
    return wanted.map(({ name }) => {
      if (!names.includes(name)) throw new Error(`no ${what} called '${name}'; there are ${names.join(", ")}`);
      return names.indexOf(name);
    });
  };
  return {
    name: `@litertjs/core ${job.versions["@litertjs/core"]}`,
    async place(model) {
      const compiled = await loadAndCompile(new Uint8Array(model), options);
      const accelerated = compiled.isFullyAccelerated;
      compiled.delete();
      return { accelerated };
    },
    async load(side, model) {
      const compiled = await loadAndCompile(new Uint8Array(model), options);
      const inputs = order(compiled.getInputDetails(), side.inputs, "input");
      const outputs = order(compiled.getOutputDetails(), side.outputs, "output");
      return {
        release: () => compiled.delete(),
        prepare: (arrays) => arrays,
        async run(arrays) {
          const given = [];
          side.inputs.forEach((spec, i) => { given[inputs[i]] = new Tensor(arrays[i], spec.shape); });
          const found = await compiled.run(given);
          const read = [];
          for (const index of outputs) {
            // Without the read-back the time is that of handing the work to the GPU.
            const here = isWasm ? found[index] : await found[index].moveTo("wasm");
            const shape = [...here.type.layout.dimensions];
            read.push({ dtype: here.type.dtype, shape, data: here.toTypedArray().slice() });
            here.delete();
          }
          for (const tensor of [...given, ...found]) if (!tensor.deleted) tensor.delete();
          return read;
        },
      };
    },
  };
}

const RUNTIMES = { onnx: onnxRuntime, tflite: liteRt };

async function gpuConditions(accelerator) {
  if (accelerator === "wasm") return {};
  if (accelerator === "webnn") {
    if (!navigator.ml) throw new Error("this browser has no WebNN (navigator.ml)");
    return {};
  }
  const adapter = await navigator.gpu?.requestAdapter();
  if (!adapter) throw new Error(navigator.gpu ? "this browser has WebGPU but no adapter for it" : "this browser has no WebGPU");
  const info = adapter.info ?? {};
  const told = [info.vendor, info.architecture, info.description].filter(Boolean).join(" ");
  const software = info.isFallbackAdapter || adapter.isFallbackAdapter || /swiftshader|llvmpipe|basic render/i.test(told);
  return { gpu: told, emulated: software ? `software GPU (${told})` : "" };
}

function settled(latency) {
  if (latency.length < 2 * WINDOW) return false;
  const before = median(latency.slice(-2 * WINDOW, -WINDOW));
  return Math.abs(median(latency.slice(-WINDOW)) - before) < SETTLED * before;
}

async function timed(one, group) {
  const began = performance.now();
  for (let i = 0; i < group; i++) await one.run(one.sample);
  return (performance.now() - began) / group;
}

// One file: loaded, run once, and warm.
async function start(job, number, runtime, step) {
  const side = job.sides[number];
  const model = await bytes(`./model?side=${number}`);
  const samples = new Uint8Array(await bytes(`./samples?side=${number}`));
  const arraysOf = (batch) => { // samples lie one after the other, each with all inputs in the side's order
    let offset = batch * side.bytes_per_batch;
    return side.inputs.map(({ dtype, shape }) => {
      const size = shape.reduce((a, b) => a * b, 1) * ARRAYS[dtype].BYTES_PER_ELEMENT;
      const copied = samples.slice(offset, offset + size);
      offset += size;
      return new ARRAYS[dtype](copied.buffer);
    });
  };
  const loading = performance.now();
  const loaded = await runtime.load(side, model);
  const loadMs = performance.now() - loading;
  const one = { ...loaded, side, number, arraysOf, loadMs, batches: samples.length / side.bytes_per_batch };
  one.sample = one.prepare(arraysOf(0));
  // A clock of 0.1 ms says little of one short inference: the first and the warm-up are single all the same.
  one.first = await timed(one, 1);
  const { plan } = job;
  const warmup = [];
  let spent = 0;
  const more = async () => { await breathe(); warmup.push(await timed(one, 1)); spent += warmup.at(-1); };
  while (warmup.length < plan.warmup_runs || spent < plan.warmup_s * 1e3) await more();
  const [least, leastMs] = [warmup.length, spent];
  one.converged = true;
  while (!settled(warmup)) {
    if (warmup.length - least >= SETTLING_RUNS || spent - leastMs >= SETTLING_MS) { one.converged = false; break; }
    await more();
  }
  const typical = median(warmup.slice(-WINDOW)) || step;
  return Object.assign(one, {
    warmup, group: Math.max(1, Math.ceil(step / (TIMER_SHARE * typical))), latency: [], spent: 0, turns: 0,
  });
}

// Files take turns until all have enough; one that is alone stops there.
async function timeAll(files, plan, orders) {
  const isEnough = ({ latency, spent }) =>
    (latency.length >= plan.min_runs && spent >= plan.min_s * 1e3) || (latency.length && spent >= plan.max_s * 1e3);
  for (let round = 0; !files.every(isEnough); round++) {
    for (const number of orders[round % orders.length]) {
      const one = files[number];
      const [before, spentBefore] = [one.latency.length, one.spent];
      one.turns += 1;
      do {
        await breathe();
        one.latency.push(await timed(one, one.group));
        one.spent += one.latency.at(-1) * one.group;
      } while (files.length === 1
        ? !isEnough(one)
        : one.latency.length - before < TURN_RUNS || one.spent - spentBefore < TURN_MS);
    }
  }
}

async function sendOutputs(one) {
  const parts = one.side.outputs.map(() => []);
  for (let batch = 0; batch < one.batches; batch++)
    (await one.run(one.prepare(one.arraysOf(batch)))).forEach((output, i) => parts[i].push(output));
  for (const [index, outputs] of parts.entries()) {
    const { dtype, shape } = outputs[0];
    const query = new URLSearchParams({ side: one.number, index, dtype, shape: shape.join(",") });
    await send(`./output?${query}`, new Blob(outputs.map(({ data }) => data)), "application/octet-stream");
  }
}

// The blocks of a job, in the order of its sides.
async function measure(job) {
  const step = timerStep();
  const conditions = await gpuConditions(job.accelerator);
  const [runtimes, runtimeMs] = [{}, {}];
  for (const { target } of job.sides) {
    if (runtimes[target]) continue;
    const began = performance.now();
    runtimes[target] = await RUNTIMES[target](job);
    runtimeMs[target] = performance.now() - began;
  }
  const files = [];
  for (const number of job.orders.at(-1)) files[number] = await start(job, number, runtimes[job.sides[number].target], step);
  await timeAll(files, job.plan, job.orders);
  await new Promise((resolve) => setTimeout(resolve, 20)); // for an event that is still on its way
  const wasHidden = hidden; // what follows is not timed
  if (job.wants_outputs) for (const one of files) await sendOutputs(one);
  for (const one of files) { // one file in memory at a time
    await one.release();
    const model = await bytes(`./model?side=${one.number}`);
    const runtime = runtimes[one.side.target];
    one.placement = await listening(PLACEMENT, () => runtime.place(model));
    if (job.plan.profile && runtime.profile)
      one.profile = await listening(PROFILE, () => runtime.profile(model, one.sample));
  }
  return files.map((one) => ({
    placement: one.placement, profile: one.profile ?? { lines: [] },
    runtime_load_ms: runtimeMs[one.side.target], model_load_ms: one.loadMs, first_inference_ms: one.first,
    warmup_ms: one.warmup, latency_ms: one.latency, peak_memory_bytes: null, converged: one.converged,
    conditions: {
      ...conditions, runtime: runtimes[one.side.target].name, accelerator: job.accelerator,
      threads: String(job.plan.threads), timer_step_ns: String(Math.round(step * 1e6)),
      inferences_per_sample: String(one.group), timed_to: "outputs read back",
      // A browser compiles the parts of a runtime when they are first used: the first file pays for the second.
      ...(files.length > 1 ? { turns: String(one.turns), shared_start: "one page loads both files" } : {}),
    },
    void: wasHidden ? "the page was hidden: browsers slow down what is not seen" : "",
  }));
}

const facts = {
  user_agent: navigator.userAgent, cores: String(navigator.hardwareConcurrency ?? ""),
  memory_gb: String(navigator.deviceMemory ?? ""), secure: String(isSecureContext), isolated: String(crossOriginIsolated),
  webgpu: String("gpu" in navigator), webnn: String("ml" in navigator), screen: `${screen.width}x${screen.height}`,
};

async function main() {
  await send("./hello", JSON.stringify(facts));
  for (;;) {
    state("waiting for a job …");
    const answer = await fetch("./job");
    if (answer.status === 204) continue;
    if (answer.status === 410) { state("done; this page can be closed"); return; }
    if (!answer.ok) throw new Error(`job: ${answer.status}`);
    const job = await answer.json();
    const targets = job.sides.map(({ target }) => target).join(" and ");
    state(`measuring ${targets} with ${job.accelerator}, ${job.plan.threads} thread(s) …`);
    hidden = document.visibilityState !== "visible";
    let result;
    try {
      if (job.plan.threads > 1 && !crossOriginIsolated)
        throw new Error(`${job.plan.threads} threads need a page that is isolated (HTTPS or localhost); this one is not`);
      const blocks = await measure(job);
      const coarse = "the page is not isolated: one thread, and a coarse clock";
      if (!crossOriginIsolated) for (const { conditions } of blocks) conditions.not_isolated = coarse;
      result = { id: job.id, blocks };
    } catch (error) {
      result = { id: job.id, error: String(error?.message ?? error) };
    }
    await send("./result", JSON.stringify(result));
    location.reload(); // the next block has a page of its own
    return;
  }
}

main().catch((error) => {
  state(`stopped: ${error?.message ?? error}`);
});
