// The explorer's page: upload, progress, results. Content from models, reports and files is inserted as text only.
import { Viewer } from "/viewer.js";

const $ = (id) => document.getElementById(id);
const POLL_MS = 400;
const STEPS = ["receiving", "waiting", "reading", "encoding", "saliency"];
let about, session, viewer, chosen;

async function ask(path, options) {
  const answer = await fetch(path, options);
  if (!answer.ok) throw new Error(await reasonOf(answer.text(), answer.status));
  return answer.status === 204 ? null : answer.json();
}

async function reasonOf(text, status) {
  const body = await text;
  try {
    return JSON.parse(body).detail ?? body;
  } catch {
    return body || `the explorer answered ${status}`;
  }
}

function show(...ids) {
  for (const id of ["start", "progress", "refusal", "results"]) $(id).hidden = !ids.includes(id);
  $("end").hidden = !session;
}

function element(tag, text, name) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (name) made.className = name;
  return made;
}

function step(name) {
  const at = STEPS.indexOf(name);
  for (const item of $("steps").children) {
    const place = STEPS.indexOf(item.dataset.step);
    item.className = place < at ? "past" : place === at ? "now" : "";
    if (place === at) item.setAttribute("aria-current", "step");
    else item.removeAttribute("aria-current");
  }
  const now = $("steps").children[at];
  if (now && $("status").textContent !== now.textContent) $("status").textContent = now.textContent;
}

async function open(file) {
  if (!file || session) return;
  let own;
  try {
    own = session = (await ask("/api/sessions", { method: "POST" })).session;
    show("progress");
    step("receiving");
    await send(file);
    await wait(own);
    if (own === session) await results();
  } catch (error) {
    if (own === undefined) refuse(error.message);
    else if (own === session) await end(error.message);
  }
}

function send(file) {
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest();
    request.open("PUT", `/api/sessions/${session}/scan?name=${encodeURIComponent(file.name)}`);
    request.upload.onprogress = (event) => {
      $("sending").textContent = `${file.name}: ${megabytes(event.loaded)} of ${megabytes(file.size)} sent`;
    };
    request.onload = async () => {
      if (request.status < 300) resolve();
      else reject(new Error(await reasonOf(Promise.resolve(request.responseText), request.status)));
    };
    request.onerror = () => reject(new Error(
      `the upload was interrupted; the file may be larger than the limit of ${megabytes(about.upload_mb * 2 ** 20)}, or the explorer was stopped`));
    request.send(file);
  });
}

const megabytes = (bytes) => bytes < 1e6 ? `${Math.ceil(bytes / 1e3)} kB` : `${(bytes / 2 ** 20).toFixed(0)} MB`;

async function wait(own) {
  while (own === session) {
    const now = await ask(`/api/sessions/${own}`);
    if (now.state === "refused") throw new Error(now.message);
    if (now.state === "done") return;
    step(now.state);
    await new Promise((resolve) => setTimeout(resolve, POLL_MS));
  }
}

async function results() {
  const result = await ask(`/api/sessions/${session}/result`);
  show("results");
  const { name, kind, voxels, spacing, steps } = result.scan;
  const thinned = steps.some((one) => one > 1) ? `; subsampled by ${steps.join(" × ")} for display` : "";
  $("told").textContent = `${name} · ${kind} · ${voxels.join(" × ")} voxels of ${spacing.join(" × ")} mm${thinned}`;
  $("notes").replaceChildren(...result.notes.map((note) => element("li", note)));
  $("notes").hidden = !result.notes.length;
  findings(result.findings);
  $("report-part").hidden = result.report === null;
  $("report").textContent = result.report || "The generated report is empty.";
  neighbours(result.neighbours);
  $("results").scrollIntoView({ block: "start" });
  viewer = new Viewer($("canvas"), locate);
  try {
    await viewer.open(`/api/sessions/${session}/scan.nii`);
    for (const [id, axis] of [["sagittal", 0], ["coronal", 1], ["axial", 2]]) {
      $(id).oninput = () => viewer.moveTo(axis, $(id).value / 1000);
    }
    viewer.goTo(viewer.nv.frac2mm([0.5, 0.5, 0.5]));
    document.body.dataset.ready = "scan";
  } catch (error) {
    $("viewer-problem").textContent = `This browser cannot display the scan (${error.message}); WebGL 2 is required. The findings are not affected.`;
    $("viewer-problem").hidden = false;
    document.body.dataset.ready = "no viewer";
  }
}

function findings(list) {
  const rows = list.map((finding, number) => {
    const row = element("tr");
    const title = element("th", finding.name);
    title.scope = "row";
    const value = element("td", undefined, "score");
    value.append(element("span", finding.value.toFixed(2), "num"));
    const bar = element("span", undefined, "bar");
    bar.setAttribute("aria-hidden", "true");
    bar.append(element("span"));
    bar.style.setProperty("--p", `${(100 * finding.value).toFixed(1)}%`);
    value.append(bar);
    const place = element("td");
    if (finding.place) {
      title.append(element("span", finding.place.words, "place"));
      const button = element("button", "Show");
      button.type = "button";
      button.setAttribute("aria-pressed", "false");
      button.setAttribute("aria-label", `Show where: ${finding.name}`);
      button.onclick = () => choose(row, button, finding, number);
      place.append(button);
    } else {
      place.append(element("span", "–", "quiet"));
    }
    row.append(title, value, place);
    return row;
  });
  $("findings").replaceChildren(...rows);
  $("where-note").hidden = !list.some((finding) => finding.place);
}

async function choose(row, button, finding, number) {
  const same = chosen === number;
  hide();
  if (same || !viewer) return;
  chosen = number;
  row.classList.add("chosen");
  button.setAttribute("aria-pressed", "true");
  try {
    await viewer.overlay(`/api/sessions/${session}/saliency/${number}.nii`);
  } catch {
    hide();
    $("viewer-problem").textContent = "This overlay is no longer available, because the session has ended. Open the scan again.";
    $("viewer-problem").hidden = false;
    return;
  }
  viewer.goTo(finding.place.mm);
  $("overlay-name").textContent = finding.name;
  $("overlay").hidden = false;
  document.body.dataset.shown = finding.name;
}

function hide() {
  chosen = undefined;
  viewer?.clear();
  $("overlay").hidden = true;
  delete document.body.dataset.shown;
  for (const row of $("findings").children) {
    row.classList.remove("chosen");
    row.querySelector("button")?.setAttribute("aria-pressed", "false");
  }
}

function neighbours(list) {
  $("near-part").hidden = list === null;
  if (list === null) return;
  $("near-note").textContent = about.nearest + (about.shows_pool ? "" : " Reports and images of the pool are not shown, because the explorer was started without --show-reports.");
  $("near").replaceChildren(...list.map((one, number) => {
    const item = element("li");
    item.append(element("h3", `${number + 1}. Similarity ${one.similarity.toFixed(2)}${one.study_id ? ` · ${one.study_id}` : ""}`));
    if (one.picture) {
      const picture = element("img");
      picture.src = `/api/sessions/${session}/xray/${number}.png`;
      picture.alt = `Radiograph ${one.study_id ?? number + 1}`;
      item.append(picture);
    }
    if (one.findings) item.append(element("p", one.findings.length ? one.findings.join(", ") : "No finding in its report"));
    if (one.report) item.append(element("p", one.report, "quiet"));
    return item;
  }));
}

function locate(place) {
  const [x, y, z] = place.mm;
  const side = (value, plus, minus) => `${value < 0 ? minus : plus} ${Math.abs(value).toFixed(0)}`;
  const value = place.values?.[0]?.value;
  const hu = Number.isFinite(value) ? `${value.toFixed(0)} HU · ` : "";
  $("readout").textContent = `${hu}${side(x, "R", "L")}, ${side(y, "A", "P")}, ${side(z, "S", "I")} mm`;
  const at = viewer.position();
  for (const [id, axis, word] of [["sagittal", 0, "R"], ["coronal", 1, "A"], ["axial", 2, "S"]]) {
    $(id).value = Math.round(at[axis] * 1000);
    $(id).setAttribute("aria-valuetext", `${side(place.mm[axis], word, { R: "L", A: "P", S: "I" }[word])} mm`);
  }
}

function refuse(reason) {
  $("reason").textContent = reason;
  show("refusal");
  $("again").focus();
}

async function end(reason) {
  const key = session;
  session = undefined;
  delete document.body.dataset.ready;
  hide();
  viewer?.close();
  viewer = undefined;
  $("file").value = "";
  $("sending").textContent = "";
  $("viewer-problem").hidden = true;
  if (reason) refuse(reason);
  else { show("start"); $("file").focus(); }
  await fetch(`/api/sessions/${key}/end`, { method: "POST" }).catch(() => {});
}

function listen() {
  $("file").onchange = () => open($("file").files[0]);
  for (const kind of ["dragenter", "dragover"]) {
    addEventListener(kind, (event) => { event.preventDefault(); $("drop").classList.add("over-it"); });
  }
  for (const kind of ["dragleave", "drop"]) {
    addEventListener(kind, (event) => { event.preventDefault(); $("drop").classList.remove("over-it"); });
  }
  addEventListener("drop", (event) => open(event.dataTransfer.files[0]));
  $("again").onclick = () => { show("start"); $("file").focus(); };
  $("end").onclick = () => end();
  $("hide").onclick = hide;
  $("opacity").oninput = () => viewer?.opacity($("opacity").value / 100);
  for (const button of document.querySelectorAll("[data-window]")) {
    button.onclick = () => {
      for (const other of document.querySelectorAll("[data-window]")) other.setAttribute("aria-pressed", String(other === button));
      viewer?.window(button.dataset.window);
    };
  }
  // Sent even while the page unloads.
  addEventListener("pagehide", () => { if (session) fetch(`/api/sessions/${session}/end`, { method: "POST", keepalive: true }); });
  addEventListener("pageshow", (event) => { if (event.persisted) location.reload(); });
}

async function start() {
  listen();
  about = await ask("/api/about");
  $("most").textContent = megabytes(about.upload_mb * 2 ** 20);
  $("idle").textContent = about.idle_minutes;
  $("where").textContent = location.host;
  for (const [name, value] of Object.entries(about.facts)) {
    const row = element("div");
    row.append(element("dt", name), element("dd", value));
    $("facts").append(row);
  }
}

start();
