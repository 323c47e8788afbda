// One block is one load of this page: take a job, load the runtime and the file, warm up, time, compute the outputs,
// send the result, load the page anew. The rules are those of devices/agent/; see docs/measuring.md.

const WINDOW = 10; // inferences in each of the two windows whose medians are compared
const SETTLED = 0.02; // their largest relative difference
const SETTLING_RUNS = 200; // caps of the settling, counted after the minimum warm-up
const SETTLING_MS = 5000;
const TIMER_SHARE = 0.02; // largest share of one sample that a step of the clock may be

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

// A runtime is {name, conditions, prepare(arrays), run(prepared) -> outputs read back, in the job's order}.

async function onnxRuntime(job, model) {
  const isWasm = job.accelerator === "wasm";
  const ort = await import(isWasm ? "./library/ort/ort.wasm.min.mjs" : "./library/ort/ort.webgpu.min.mjs");
  ort.env.wasm.wasmPaths = new URL("./library/ort/", document.baseURI).href;
  ort.env.wasm.numThreads = job.plan.threads;
  ort.env.logLevel = "error";
  const loading = performance.now();
  const session = await ort.InferenceSession.create(new Uint8Array(model), {
    executionProviders: [job.accelerator], graphOptimizationLevel: "all",
  });
  for (const [what, wanted, found] of [["input", job.inputs, session.inputNames], ["output", job.outputs, session.outputNames]])
    for (const { name } of wanted)
      if (!found.includes(name)) throw new Error(`no ${what} called '${name}'; there are ${found.join(", ")}`);
  return {
    name: `onnxruntime-web ${job.versions["onnxruntime-web"]}`,
    loadMs: performance.now() - loading,
    conditions: {},
    prepare: (arrays) => Object.fromEntries(job.inputs.map((spec, i) => [spec.name, new ort.Tensor(spec.dtype, arrays[i], spec.shape)])),
    async run(feeds) {
      const outputs = await session.run(feeds, job.outputs.map(({ name }) => name));
      const read = [];
      for (const { name } of job.outputs) { // getData waits for what is still on the GPU
        read.push({ dtype: outputs[name].type, shape: outputs[name].dims, data: await outputs[name].getData() });
        outputs[name].dispose();
      }
      return read;
    },
  };
}

async function liteRt(job, model) {
  const { loadLiteRt, loadAndCompile, Tensor } = await import("@litertjs/core");
  const isWasm = job.accelerator === "wasm";
  const threads = isWasm && job.plan.threads > 1;
  await loadLiteRt(new URL("./library/litert/wasm/", document.baseURI).href, isWasm ? { threads } : { jspi: true });
  const loading = performance.now();
  const options = { accelerator: job.accelerator };
  if (threads) options.cpuOptions = { numThreads: job.plan.threads };
  const compiled = await loadAndCompile(new Uint8Array(model), options);
  const order = (details, wanted, what) => {
    const names = details.map(({ name }) => name);
    return wanted.map(({ name }) => {
      if (!names.includes(name)) throw new Error(`no ${what} called '${name}'; there are ${names.join(", ")}`);
      return names.indexOf(name);
    });
  };
  const inputs = order(compiled.getInputDetails(), job.inputs, "input");
  const outputs = order(compiled.getOutputDetails(), job.outputs, "output");
  return {
    name: `@litertjs/core ${job.versions["@litertjs/core"]}`,
    loadMs: performance.now() - loading,
    conditions: {},
    prepare: (arrays) => arrays,
    async run(arrays) {
      const given = [];
      job.inputs.forEach((spec, i) => { given[inputs[i]] = new Tensor(arrays[i], spec.shape); });
      const found = await compiled.run(given);
      const read = [];
      for (const index of outputs) {
        // Without the read-back the time is that of handing the work to the GPU.
        const here = isWasm ? found[index] : await found[index].moveTo("wasm");
        read.push({ dtype: here.type.dtype, shape: [...here.type.layout.dimensions], data: here.toTypedArray().slice() });
        here.delete();
      }
      for (const tensor of [...given, ...found]) if (!tensor.deleted) tensor.delete();
      return read;
    },
  };
}

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

async function timed(runtime, prepared, group) {
  const began = performance.now();
  for (let i = 0; i < group; i++) await runtime.run(prepared);
  return (performance.now() - began) / group;
}

function settled(latency) {
  if (latency.length < 2 * WINDOW) return false;
  const before = median(latency.slice(-2 * WINDOW, -WINDOW));
  return Math.abs(median(latency.slice(-WINDOW)) - before) < SETTLED * before;
}

async function measure(job) {
  const step = timerStep();
  const conditions = { ...(await gpuConditions(job.accelerator)) };
  const model = await bytes("./model");
  const samples = new Uint8Array(await bytes("./samples"));
  const arraysOf = (batch) => { // samples lie one after the other, each with all inputs in the job's order
    let offset = batch * job.bytes_per_batch;
    return job.inputs.map(({ dtype, shape }) => {
      const size = shape.reduce((a, b) => a * b, 1) * ARRAYS[dtype].BYTES_PER_ELEMENT;
      const copied = samples.slice(offset, offset + size);
      offset += size;
      return new ARRAYS[dtype](copied.buffer);
    });
  };
  const began = performance.now();
  const runtime = await (job.target === "onnx" ? onnxRuntime : liteRt)(job, model);
  const runtimeMs = performance.now() - began - runtime.loadMs;
  const sample = runtime.prepare(arraysOf(0));
  const plan = job.plan;
  // A clock of 0.1 ms says little of one short inference: the first and the warm-up are single all the same.
  const first = await timed(runtime, sample, 1);
  const warmup = [];
  let spent = 0;
  const one = async () => { await breathe(); warmup.push(await timed(runtime, sample, 1)); spent += warmup.at(-1); };
  while (warmup.length < plan.warmup_runs || spent < plan.warmup_s * 1e3) await one();
  const [least, leastMs] = [warmup.length, spent];
  let converged = true;
  while (!settled(warmup)) {
    if (warmup.length - least >= SETTLING_RUNS || spent - leastMs >= SETTLING_MS) { converged = false; break; }
    await one();
  }
  const typical = median(warmup.slice(-WINDOW)) || step;
  const group = Math.max(1, Math.ceil(step / (TIMER_SHARE * typical)));
  const latency = [];
  spent = 0;
  while (latency.length < plan.min_runs || spent < plan.min_s * 1e3) {
    await breathe();
    latency.push(await timed(runtime, sample, group));
    spent += latency.at(-1) * group;
    if (spent >= plan.max_s * 1e3) break;
  }
  await new Promise((resolve) => setTimeout(resolve, 20)); // for an event that is still on its way
  const wasHidden = hidden; // what follows is not timed
  const batches = job.wants_outputs ? samples.length / job.bytes_per_batch : 0;
  const parts = job.outputs.map(() => []);
  for (let batch = 0; batch < batches; batch++)
    (await runtime.run(runtime.prepare(arraysOf(batch)))).forEach((output, i) => parts[i].push(output));
  for (const [i, spec] of job.outputs.entries()) {
    if (!batches) break;
    const { dtype, shape } = parts[i][0];
    const query = new URLSearchParams({ index: i, dtype, shape: shape.join(",") });
    await send(`./output?${query}`, new Blob(parts[i].map(({ data }) => data)), "application/octet-stream");
  }
  return {
    runtime_load_ms: runtimeMs, model_load_ms: runtime.loadMs, first_inference_ms: first, warmup_ms: warmup,
    latency_ms: latency, peak_memory_bytes: null, converged,
    conditions: {
      ...conditions, ...runtime.conditions, runtime: runtime.name, accelerator: job.accelerator,
      threads: String(plan.threads), timer_step_ns: String(Math.round(step * 1e6)),
      inferences_per_sample: String(group), timed_to: "outputs read back",
    },
    void: wasHidden ? "the page was hidden: browsers slow down what is not seen" : "",
  };
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
    state(`measuring a ${job.target} file with ${job.accelerator}, ${job.plan.threads} thread(s) …`);
    hidden = document.visibilityState !== "visible";
    let result;
    try {
      if (job.plan.threads > 1 && !crossOriginIsolated)
        throw new Error(`${job.plan.threads} threads need a page that is isolated (HTTPS or localhost); this one is not`);
      const block = await measure(job);
      if (!crossOriginIsolated) block.conditions.not_isolated = "the page is not isolated: one thread, and a coarse clock";
      result = { id: job.id, block };
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
