// Pictures: an image under its mask or depth, coloured here, so that opacity and hidden classes cost no request.

// From far to near; pipeline/overlay.py has the same.
const DEPTH_RAMP = [[13, 8, 135], [126, 3, 168], [204, 71, 120], [248, 149, 64], [240, 249, 33]];
const EMPTY = ["#8b93a1", "#7d8593"];  // no image: squares of two grays, which no photograph is
const SQUARE = 16;

export class Refused extends Error {}

export async function ask(url, signal) {
  const response = await fetch(url, {signal});
  if (response.ok) return response;
  let text = `the server answers ${response.status}`;
  try { text = (await response.json()).error || text; } catch { /* it is no JSON */ }
  throw new Refused(text);
}

// The map of a row or a target: see PixelMap.encode in maps.py.
export async function readMap(url, signal) {
  const data = await (await ask(url, signal)).arrayBuffer();
  const length = new DataView(data).getUint32(0, true);
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(data, 4, length)));
  // Models of several label spaces stand side by side, and the same number is another class in each.
  for (const entry of header.entries || []) entry.key = `${entry.id} ${entry.name}`;
  return {...header, codes: new Uint16Array(data, 4 + length, header.rows * header.columns)};
}

export async function readImage(url, signal) {
  const response = await ask(url, signal);
  const [width, height] = response.headers.get("X-Image-Size").split(" ").map(Number);
  return {bitmap: await createImageBitmap(await response.blob()), width, height};
}

export function depthColor(nearness) {
  const place = Math.min(Math.max(nearness, 0), 1) * (DEPTH_RAMP.length - 1);
  const low = Math.min(Math.floor(place), DEPTH_RAMP.length - 2);
  return DEPTH_RAMP[low].map((value, i) => value + (DEPTH_RAMP[low + 1][i] - value) * (place - low));
}

export class Picture {
  constructor(canvas) {
    this.canvas = canvas;
    this.image = this.map = this.overlay = this.edges = null;
    this.hidden = new Set();
    this.lit = null;
  }

  set(image, map) {
    this.image = image;
    this.map = map;
    this.overlay = this.edges = null;
  }

  hide(classes, lit = null) {
    this.hidden = classes;
    this.lit = lit;
    this.overlay = this.edges = null;
  }

  // Size of the drawing: the map's pixels, or the image's, or what the row says of it.
  size(row) {
    if (this.map) return [this.map.columns, this.map.rows];
    if (this.image) return [this.image.bitmap.width, this.image.bitmap.height];
    return [row?.width || 4, row?.height || 3];
  }

  draw(row, opacity, outlines) {
    const [width, height] = this.size(row);
    Object.assign(this.canvas, {width, height});
    const context = this.canvas.getContext("2d");
    if (this.image) context.drawImage(this.image.bitmap, 0, 0, width, height);
    else {
      for (let y = 0; y < height; y += SQUARE) {
        for (let x = 0; x < width; x += SQUARE) {
          context.fillStyle = EMPTY[(x / SQUARE + y / SQUARE) % 2];
          context.fillRect(x, y, SQUARE, SQUARE);
        }
      }
    }
    if (!this.map) return;
    if (!this.overlay) [this.overlay, this.edges] = this.paint();
    context.globalAlpha = opacity;
    context.drawImage(this.overlay, 0, 0);
    context.globalAlpha = 1;
    if (outlines && opacity > 0) {
      context.drawImage(this.edges, 0, 0);
      this.drawBoxes(context, width / this.map.width, height / this.map.height);
    } else if (opacity > 0 && this.map.entries?.some((entry) => entry.box && !entry.masked)) {
      this.drawBoxes(context, width / this.map.width, height / this.map.height);
    }
  }

  visible(entry) {
    return !this.hidden.has(entry.key) && (this.lit === null || this.lit === entry.key);
  }

  drawBoxes(context, scaleX, scaleY) {
    context.lineWidth = Math.max(1, Math.round(this.canvas.width / 320));
    for (const entry of [...(this.map.entries || [])].reverse()) {
      if (!entry.box || entry.masked || !this.visible(entry)) continue;
      const [x, y, w, h] = entry.box;
      context.strokeStyle = `rgb(${entry.color.join(" ")})`;
      context.strokeRect(x * scaleX, y * scaleY, w * scaleX, h * scaleY);
    }
  }

  paint() {
    const {columns, rows, codes} = this.map;
    const fill = new ImageData(columns, rows), edge = new ImageData(columns, rows);
    const colors = new Uint32Array(fill.data.buffer), edges = new Uint32Array(edge.data.buffer);
    const palette = this.map.kind === "depth" ? this.depthPalette() : this.palette();
    for (let at = 0; at < codes.length; at++) colors[at] = palette[codes[at]];
    if (this.map.kind !== "depth") {
      for (let y = 0, at = 0; y < rows; y++) {
        for (let x = 0; x < columns; x++, at++) {
          const code = codes[at];
          if ((x && codes[at - 1] !== code) || (y && codes[at - columns] !== code) ||
              (x + 1 < columns && codes[at + 1] !== code) || (y + 1 < rows && codes[at + columns] !== code)) {
            edges[at] = palette[code];
          }
        }
      }
    }
    return [fill, edge].map((data) => {
      const canvas = document.createElement("canvas");
      Object.assign(canvas, {width: columns, height: rows});
      canvas.getContext("2d").putImageData(data, 0, 0);
      return canvas;
    });
  }

  palette() {
    const palette = new Uint32Array(65536);
    this.map.entries.forEach((entry, i) => {
      const [red, green, blue] = entry.color;
      if (this.visible(entry)) palette[i + 1] = (255 << 24 | blue << 16 | green << 8 | red) >>> 0;
    });
    return palette;
  }

  depthPalette() {
    const {scale, offset, near, far} = this.map;
    const palette = new Uint32Array(65536);
    for (let code = 1; code < 65536; code++) {
      const [red, green, blue] = depthColor((code * scale + offset - far) / (near - far || 1));
      palette[code] = (255 << 24 | blue << 16 | green << 8 | red) >>> 0;
    }
    return palette;
  }

  // What stands at a place (shares of width and height), in words; "" for nothing.
  at(x, y) {
    if (!this.map) return "";
    const {columns, rows, codes} = this.map;
    const column = Math.floor(x * columns), row = Math.floor(y * rows);
    if (column < 0 || row < 0 || column >= columns || row >= rows) return "";
    const code = codes[row * columns + column];
    if (this.map.kind === "depth") {
      if (!code) return "unknown";
      const value = code * this.map.scale + this.map.offset;
      return this.map.depth === "metric_m" ? `${value.toFixed(2)} m` : value.toPrecision(4);
    }
    const boxed = code ? null : this.smallestBox(x * this.map.width, y * this.map.height);
    const entry = code ? this.map.entries[code - 1] : boxed;
    if (!entry) return "–";
    return entry.name + (entry.crowd ? ", crowd" : "") + (entry.score == null ? "" : ` ${entry.score.toFixed(2)}`);
  }

  smallestBox(x, y) {
    const inside = (this.map.entries || []).filter(({box, masked}) =>
      box && !masked && x >= box[0] && y >= box[1] && x <= box[0] + box[2] && y <= box[1] + box[3]);
    return inside.sort((a, b) => a.box[2] * a.box[3] - b.box[2] * b.box[3])[0];
  }
}
