"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const canvas = document.getElementById("timeline"), tip = document.getElementById("tip");
  const paint = canvas.getContext("2d");
  const LABEL = 92, TITLE = 24, COMPUTE = 20, OTHER = 8, GAP = 3, AXIS = 26, PAD = 10;

  // Lanes from top to bottom; a stream beside compute is a thin lane below it.
  let height = 0;
  for (const record of data.records) {
    record.top = height;
    height += TITLE;
    for (const lane of record.lanes) {
      lane.compute = lane.stream === "compute";
      lane.y = height;
      lane.height = lane.compute ? COMPUTE : OTHER;
      lane.spans = [];
      height += lane.height + GAP;
    }
    for (const span of record.spans) record.lanes[span[0]].spans.push(span);
    height += PAD;
  }
  height += AXIS;

  const whole = Math.max(...data.records.map(r => Math.max(r.step, ...r.lanes.map(
    lane => lane.spans.reduce((end, span) => Math.max(end, span[2]), 0)))));
  let from = 0, to = whole, width = 0;

  const words = seconds => {
    const size = Math.abs(seconds);
    if (size >= 1) return seconds.toPrecision(4) + " s";
    if (size >= 1e-3) return (seconds * 1e3).toPrecision(4) + " ms";
    return size ? (seconds * 1e6).toPrecision(4) + " µs" : "0";
  };
  const x = seconds => LABEL + (seconds - from) / (to - from) * (width - LABEL - PAD);
  const seconds = pixel => from + (pixel - LABEL) / (width - LABEL - PAD) * (to - from);

  // The first span of a lane that ends after a time: spans of a lane are sorted by their start and do not overlap.
  const firstAfter = (spans, time) => {
    let low = 0, high = spans.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (spans[middle][2] <= time) low = middle + 1; else high = middle;
    }
    return low;
  };

  const drawLane = lane => {
    let drawn = -1, phase = -1;
    for (let i = firstAfter(lane.spans, from); i < lane.spans.length; i++) {
      const span = lane.spans[i];
      if (span[1] >= to) break;
      const left = Math.max(LABEL, x(span[1])), right = Math.min(width - PAD, x(span[2]));
      if (right < drawn + 0.3 && span[3] === phase) continue;  // nothing that could be seen
      const inset = span[5] ? lane.height / 4 : 0;
      paint.fillStyle = data.phases[span[3]].colour;
      paint.fillRect(left, lane.y + inset, Math.max(0.4, right - left - (right - left > 3 ? 0.5 : 0)), lane.height - 2 * inset);
      drawn = right; phase = span[3];
      const text = lane.keys[span[4]];
      if (lane.compute && right - left > 8 + 6 * text.length) {
        paint.fillStyle = "#111";
        paint.fillText(text, left + 4, lane.y + lane.height - 6);
      }
    }
  };

  const ticks = () => {
    const rough = (to - from) / 8, power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].map(n => n * power).find(n => n >= rough * (1 - 1e-9));
    const found = [];
    for (let n = Math.ceil(from / step); n * step <= to; n++) found.push(n * step);
    return found;
  };

  const draw = () => {
    width = canvas.clientWidth;
    const scale = window.devicePixelRatio || 1;
    canvas.width = Math.round(width * scale);
    canvas.height = Math.round(height * scale);
    canvas.style.height = height + "px";
    paint.setTransform(scale, 0, 0, scale, 0, 0);
    paint.clearRect(0, 0, width, height);
    paint.font = "11px system-ui, Arial, sans-serif";
    for (const time of ticks()) {
      paint.fillStyle = "#eee";
      paint.fillRect(x(time), 0, 1, height - AXIS);
      paint.fillStyle = "#444";
      paint.textAlign = "center";
      paint.fillText(words(time), x(time), height - 8);
    }
    paint.textAlign = "left";
    for (const record of data.records) {
      paint.font = "600 12px system-ui, Arial, sans-serif";
      paint.fillStyle = "#222";
      const note = record.leftOut ? `; the ${record.leftOut} shortest spans are left out` : "";
      paint.fillText(`${record.name}: ${words(record.step)} a step${note}`, LABEL, record.top + 16);
      paint.font = "11px system-ui, Arial, sans-serif";
      for (const lane of record.lanes) {
        lane.keys = record.keys;
        paint.fillStyle = "#444";
        paint.textAlign = "right";
        if (lane.compute) paint.fillText(`rank ${lane.rank}`, LABEL - 8, lane.y + 14);
        paint.textAlign = "left";
        drawLane(lane);
      }
      // The end of the step.
      if (record.step >= from && record.step <= to && record.lanes.length) {
        const last = record.lanes[record.lanes.length - 1];
        paint.fillStyle = "#d00";
        paint.fillRect(x(record.step), record.top + TITLE - 4, 1, last.y + last.height - record.top - TITLE + 8);
      }
    }
  };

  const show = (left, right) => {
    const span = Math.min(whole, Math.max(right - left, whole * 1e-6));
    from = Math.min(Math.max(0, left), whole - span);
    to = from + span;
    requestAnimationFrame(draw);
  };
  const zoom = (around, factor) => show(around - (around - from) * factor, around + (to - around) * factor);
  const place = event => {
    const box = canvas.getBoundingClientRect();
    return [event.clientX - box.left, event.clientY - box.top];
  };

  canvas.addEventListener("wheel", event => {
    event.preventDefault();
    if (Math.abs(event.deltaX) > Math.abs(event.deltaY)) {
      const by = event.deltaX / width * (to - from);
      show(from + by, to + by);
    } else zoom(seconds(place(event)[0]), Math.exp(event.deltaY * 0.0015));
  }, { passive: false });
  canvas.addEventListener("dblclick", () => show(0, whole));
  canvas.addEventListener("keydown", event => {
    const middle = (from + to) / 2, by = (to - from) / 5;
    const actions = { "+": () => zoom(middle, 0.7), "=": () => zoom(middle, 0.7), "-": () => zoom(middle, 1 / 0.7),
      "0": () => show(0, whole), ArrowLeft: () => show(from - by, to - by), ArrowRight: () => show(from + by, to + by) };
    if (event.key in actions) { event.preventDefault(); actions[event.key](); }
  });

  let held = null;
  canvas.addEventListener("pointerdown", event => {
    held = { at: place(event)[0], from, to };
    canvas.setPointerCapture(event.pointerId);
  });
  canvas.addEventListener("pointerup", () => { held = null; });
  canvas.addEventListener("pointermove", event => {
    const [left, top] = place(event);
    if (held) {
      const by = (held.at - left) / (width - LABEL - PAD) * (held.to - held.from);
      show(held.from + by, held.to + by);
      return;
    }
    hover(left, top);
  });
  canvas.addEventListener("pointerleave", () => { tip.hidden = true; });

  const hover = (left, top) => {
    const time = seconds(left);
    for (const record of data.records) for (const lane of record.lanes) {
      if (top < lane.y || top > lane.y + lane.height) continue;
      const span = lane.spans[firstAfter(lane.spans, time)];
      if (!span || span[1] > time) break;
      const kind = span[5] ? "waiting in " : "";
      tip.textContent = `rank ${lane.rank}, ${lane.stream}: ${kind}${record.keys[span[4]]} — ${words(span[2] - span[1])}`
        + ` (${data.phases[span[3]].name}, from ${words(span[1])})`;
      tip.hidden = false;
      tip.style.left = Math.min(left + 12, width - tip.offsetWidth - 8) + "px";
      tip.style.top = top + 18 + "px";
      return;
    }
    tip.hidden = true;
  };

  const used = new Set(data.records.flatMap(record => record.spans.map(span => span[3])));
  const legend = document.getElementById("legend");
  data.phases.forEach((phase, number) => {
    if (!used.has(number)) return;
    const entry = document.createElement("span"), box = document.createElement("i");
    box.style.background = phase.colour;
    entry.append(box, phase.name);
    legend.append(entry);
  });
  window.addEventListener("resize", draw);
  draw();
})();
