// Two videos and their difference, frame by frame in step. `element` and `props` come from gr.HTML; props.value is what
// unicp.studio.views.player gives: the sheets of frames, their layout and the captions.
const root = element.querySelector(".unicp-player");
const find = (name) => root.querySelector("." + name);
const canvases = { left: find("left"), right: find("right"), apart: find("apart") };
const state = { frame: 0, playing: false, drawn: 0, shown: null };
root.player = state; // for tests
let data = null, images = {}, last = 0;

const pen = (name) => canvases[name].getContext("2d", { willReadFrequently: true });

function draw() {
  const sheets = [images.left, images.right];
  if (!data || sheets.some((sheet) => !sheet || !sheet.complete || !sheet.naturalWidth)) return;
  const { width, height, columns, frames } = data.layout;
  const x = (state.frame % columns) * width, y = Math.floor(state.frame / columns) * height;
  for (const side of ["left", "right"]) pen(side).drawImage(images[side], x, y, width, height, 0, 0, width, height);
  const one = pen("left").getImageData(0, 0, width, height), two = pen("right").getImageData(0, 0, width, height);
  const out = new ImageData(width, height), gain = Number(find("gain").value);
  for (let i = 0; i < out.data.length; i += 4) {
    for (let c = 0; c < 3; c++) out.data[i + c] = Math.abs(one.data[i + c] - two.data[i + c]) * gain;
    out.data[i + 3] = 255;
  }
  pen("apart").putImageData(out, 0, 0);
  find("scrub").value = state.frame;
  find("frame-text").textContent = `${state.frame + 1} / ${frames}`;
  state.drawn++;
}

function tick(now) {
  if (!state.playing || !root.isConnected) return;
  const every = 1000 / (data.fps * Number(find("rate").value));
  if (now - last >= every) {
    last = now - Math.min((now - last) % every, every);
    state.frame = (state.frame + 1) % data.layout.frames;
    draw();
  }
  requestAnimationFrame(tick);
}

function play(on) {
  if (on === state.playing || !data) return;
  state.playing = on;
  find("play").textContent = on ? "❚❚" : "▶";
  if (on) { last = performance.now(); requestAnimationFrame(tick); }
}

function caption(name, title, text) {
  const bold = document.createElement("b");
  bold.textContent = title;
  find(name).replaceChildren(bold, " " + text);
}

function show(value) {
  const text = value || "";
  if (text === state.shown) return;
  state.shown = text;
  data = text ? JSON.parse(text) : null;
  root.hidden = !data;
  play(false);
  if (!data) return;
  for (const canvas of Object.values(canvases)) {
    canvas.width = data.layout.width;
    canvas.height = data.layout.height;
    canvas.classList.toggle("pixels", data.layout.width < 200);
  }
  caption("left-text", ...data.captions.left);
  caption("right-text", ...data.captions.right);
  find("scrub").max = data.layout.frames - 1;
  state.frame = 0;
  let waiting = 2;
  images = {};
  for (const side of ["left", "right"]) {
    const image = images[side] = new Image();
    image.onload = () => { if (!--waiting) { draw(); play(!matchMedia("(prefers-reduced-motion: reduce)").matches); } };
    image.src = data[side];
  }
}

find("play").onclick = () => play(!state.playing);
find("gain").oninput = () => { find("gain-text").textContent = find("gain").value; draw(); };
find("scrub").oninput = () => { play(false); state.frame = Number(find("scrub").value); draw(); };
root.onkeydown = (event) => {
  const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (!data || !by || /^(INPUT|SELECT)$/.test(event.target.tagName)) return;
  play(false);
  state.frame = (state.frame + by + data.layout.frames) % data.layout.frames;
  draw();
};
show(props.value);
watch("value", () => show(props.value));
