"use strict";
(() => {
  const $ = (id) => document.getElementById(id);
  const data = JSON.parse($("data").textContent);

  // --- light and dark
  $("theme").onclick = () => {
    const root = document.documentElement;
    const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
  };

  // --- the curve
  const chosen = () => {
    for (const figure of document.querySelectorAll("#charts figure")) {
      figure.hidden = figure.dataset.measure !== $("measure").value || figure.dataset.kind !== $("kind").value;
    }
  };
  $("measure").onchange = $("kind").onchange = chosen;
  chosen();
  for (const button of document.querySelectorAll(".legend button")) {
    button.onclick = () => {
      const on = button.getAttribute("aria-pressed") !== "true";
      button.setAttribute("aria-pressed", on);
      for (const curve of document.querySelectorAll("#charts .curve")) {
        if (curve.dataset.method === button.dataset.method) curve.classList.toggle("off", !on);
      }
    };
  }

  // --- the players
  const layout = data.layout;
  if (!layout) { $("watch").hidden = true; return; }
  const state = { prompt: 0, method: null, frame: 0, playing: false, drawn: 0 };
  window.unicpPlayer = state;
  const sheets = new Map();

  const sheet = (point, prompt) => {
    const source = (data.videos[point] || {})[prompt];
    if (!source) return null;
    const key = point + "\n" + prompt;
    if (!sheets.has(key)) {
      const image = new Image();
      image.onload = draw;
      image.src = source;
      sheets.set(key, image);
    }
    const image = sheets.get(key);
    return image.complete && image.naturalWidth ? image : null;
  };
  const has = (point, prompt) => Boolean((data.videos[point] || {})[prompt]);

  const paint = (canvas, image, frame) => {
    const pen = canvas.getContext("2d", { willReadFrequently: true });
    if (!image) { pen.clearRect(0, 0, canvas.width, canvas.height); return null; }
    const x = (frame % layout.columns) * layout.width, y = Math.floor(frame / layout.columns) * layout.height;
    pen.drawImage(image, x, y, layout.width, layout.height, 0, 0, layout.width, layout.height);
    return pen;
  };

  const size = (canvas) => {
    canvas.width = layout.width;
    canvas.height = layout.height;
    canvas.classList.toggle("pixels", layout.width < 200);
  };
  for (const id of ["left", "right", "difference"]) size($(id));

  const subtract = (a, b) => {
    const one = a.getImageData(0, 0, layout.width, layout.height), two = b.getImageData(0, 0, layout.width, layout.height);
    const out = new ImageData(layout.width, layout.height), gain = Number($("gain").value);
    for (let i = 0; i < out.data.length; i += 4) {
      for (let c = 0; c < 3; c++) out.data[i + c] = Math.abs(one.data[i + c] - two.data[i + c]) * gain;
      out.data[i + 3] = 255;
    }
    $("difference").getContext("2d").putImageData(out, 0, 0);
  };

  function draw() {
    const a = paint($("left"), sheet(data.baseline, state.prompt), state.frame);
    const b = paint($("right"), sheet(state.method, state.prompt), state.frame);
    if (a && b) subtract(a, b);
    for (const canvas of document.querySelectorAll("#wall canvas")) {
      paint(canvas, sheet(canvas.dataset.point, state.prompt), state.frame);
    }
    $("scrub").value = state.frame;
    $("frame-text").textContent = `${state.frame + 1} / ${layout.frames}`;
    if (a && b) state.drawn++;
  }

  const psnr = (value) => value === null ? "" : value >= 100 ? ", identical" : `, ${value.toFixed(1)} dB`;
  const words = () => {
    const base = data.figures[data.baseline][state.prompt], mine = (data.figures[state.method] || {})[state.prompt];
    $("left-text").innerHTML = "<b></b><br>";
    $("left-text").firstChild.textContent = data.baseline;
    $("left-text").append(`${base.seconds.toFixed(2)} s`);
    $("right-text").innerHTML = "<b></b><br>";
    $("right-text").firstChild.textContent = state.method;
    $("right-text").append(mine ? `${mine.seconds.toFixed(2)} s, ${mine.speedup.toFixed(2)}× as fast${psnr(mine.psnr)}` : "not embedded for this prompt");
    for (const button of document.querySelectorAll("#wall button")) {
      const own = (data.figures[button.dataset.point] || {})[state.prompt];
      button.setAttribute("aria-pressed", button.dataset.point === state.method);
      button.querySelector("em").textContent = own ? (button.dataset.point === data.baseline ? `${own.seconds.toFixed(2)} s` : `${own.speedup.toFixed(2)}×${psnr(own.psnr)}`) : "";
      button.hidden = !own;
    }
  };

  const option = (select, value, text) => select.append(new Option(text, value));
  const playable = data.prompts.map((_, n) => n).filter((n) => has(data.baseline, n));
  for (const n of playable) option($("prompt"), n, data.prompts[n]);
  const methods = () => {
    const here = data.points.filter((point) => point.name !== data.baseline && has(point.name, state.prompt));
    $("method").replaceChildren();
    for (const point of here) option($("method"), point.name, point.name);
    if (!here.some((point) => point.name === state.method)) {
      // One of ours that changed something, if there is one: two equal videos show nothing.
      const changed = (point) => data.figures[point.name][state.prompt].psnr < 100;
      const best = (point) => 4 * changed(point) + 2 * point.forward + point.ours;
      const first = here.reduce((one, other) => one && best(one) >= best(other) ? one : other, null);
      state.method = first ? first.name : null;
    }
    if (state.method) $("method").value = state.method;
  };
  for (const point of data.points) {
    if (point.name !== data.baseline && !point.forward) continue;
    const button = document.createElement("button"), canvas = document.createElement("canvas");
    button.type = "button";
    button.dataset.point = canvas.dataset.point = point.name;
    size(canvas);
    const name = document.createElement("b"), label = document.createElement("span");
    name.textContent = point.method;
    label.textContent = point.label || "all steps";
    button.title = point.name;
    button.append(canvas, name, label, document.createElement("em"));
    button.onclick = () => { if (point.name !== data.baseline) { state.method = point.name; change(); } };
    $("wall").append(button);
  }

  const change = () => { methods(); words(); draw(); };
  $("prompt").onchange = () => { state.prompt = Number($("prompt").value); change(); };
  $("method").onchange = () => { state.method = $("method").value; change(); };
  $("gain").oninput = () => { $("gain-text").textContent = $("gain").value; draw(); };
  $("scrub").max = layout.frames - 1;
  $("scrub").oninput = () => { play(false); state.frame = Number($("scrub").value); draw(); };

  let last = 0;
  const tick = (now) => {
    if (!state.playing) return;
    const every = 1000 / (data.fps * Number($("rate").value));
    if (now - last >= every) {
      last = now - Math.min((now - last) % every, every);
      state.frame = (state.frame + 1) % layout.frames;
      draw();
    }
    requestAnimationFrame(tick);
  };
  const play = (on) => {
    if (on === state.playing) return;
    state.playing = on;
    $("play").textContent = on ? "❚❚" : "▶";
    if (on) { last = performance.now(); requestAnimationFrame(tick); }
  };
  $("play").onclick = () => play(!state.playing);
  document.addEventListener("keydown", (event) => {
    if (/^(INPUT|SELECT|BUTTON|SUMMARY)$/.test(event.target.tagName)) return;
    if (event.key === " ") { play(!state.playing); event.preventDefault(); }
    const by = { ArrowRight: 1, ArrowLeft: layout.frames - 1 }[event.key];
    if (by) { play(false); state.frame = (state.frame + by) % layout.frames; draw(); }
  });
  if (playable.length) state.prompt = playable[0];
  change();
})();
