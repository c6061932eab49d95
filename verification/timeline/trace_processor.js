// Runs the trace processor of a Perfetto UI build (wasm) outside a browser.
//
//     node trace_processor.js FOLDER_OF_THE_BUILD < requests > replies
//
// Requests and replies are TraceProcessorRpcStream messages, each after its length in four bytes.
// The build's engine is made for a web worker; this gives it the few things of one that it uses.
"use strict";
const fs = require("fs");
const path = require("path");
const vm = require("vm");

const folder = process.argv[2];
const exit = process.exit.bind(process);
const read = (name) => fs.readFileSync(path.join(folder, path.basename(String(name))));
const requests = fs.readFileSync(0);

process.on("uncaughtException", (error) => {
  fs.writeSync(2, `${String(error.message).slice(0, 2000)}\n`);
  exit(1);
});
console.log = console.warn = console.error = (...words) =>
  fs.writeSync(2, `${words.join(" ").slice(0, 2000)}\n`);
global.self = global;
global.WorkerGlobalScope = function () {};
global.location = { href: "http://localhost/" };
global.fetch = async (name) =>
  new Response(read(name), { headers: { "content-type": "application/wasm" } });
global.XMLHttpRequest = class {
  open(_, name) {
    this.name = name;
  }
  send() {
    this.response = new Uint8Array(read(this.name)).buffer;
  }
};
Object.defineProperty(globalThis, "process", { value: undefined });

let replies = [];
const port = { postMessage: (bytes) => replies.push(Buffer.from(bytes)) };


function serve() {
  self.onmessage({ data: port });
  for (let at = 0; at < requests.length; ) {
    const size = requests.readUInt32LE(at);
    replies = [];
    port.onmessage({ data: new Uint8Array(requests.subarray(at + 4, at + 4 + size)) });
    at += 4 + size;
    const reply = Buffer.concat(replies);
    const head = Buffer.alloc(4);
    head.writeUInt32LE(reply.length);
    fs.writeSync(1, Buffer.concat([head, reply]));
  }
  exit(0);
}

vm.runInThisContext(read("engine_bundle.js").toString());
setTimeout(serve, 3000); // the engine is ready a moment after it was loaded, and does not say when
