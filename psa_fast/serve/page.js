"use strict";
// everything that comes from the server or the user is written as text, never as markup
const by = (id) => document.getElementById(id);
let picture = null;

function show(file) {
  if (!file) return;
  const reader = new FileReader();
  reader.onload = () => {
    picture = reader.result;
    by("drop").querySelector("img")?.remove();
    const image = new Image();
    image.alt = "the picture that is asked about";
    image.src = picture;
    by("drop").append(image);
  };
  reader.readAsDataURL(file);
}

// lines of words, and a picture that is shown as an image only: nothing in it can run
function explain(explanation) {
  by("why").textContent = (explanation?.lines ?? []).join("\n");
  by("looks").replaceChildren();
  if (!explanation) return;
  const image = new Image();
  image.alt = "where the readings looked";
  image.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(explanation.svg)}`;
  by("looks").append(image);
}

function say(kind, answer, verdict, rows, explanation) {
  explain(explanation);
  by("result").hidden = false;
  by("answer").className = kind;
  by("answer").textContent = answer;
  by("verdict").textContent = verdict;
  by("scores").replaceChildren(...rows.map(([name, value]) => {
    const row = document.createElement("tr");
    const meter = document.createElement("meter");
    meter.value = value;
    meter.title = name;
    for (const content of [name, meter, value.toFixed(3)]) row.insertCell().append(content);
    return row;
  }));
}

function describe(psa) {
  if (!psa.checked) return `${psa.action}: ${psa.rule}`;
  const risk = psa.unsafe ? `, ${psa.type}, level ${psa.level}` : "";
  const score = psa.unsafe_score === null ? "" : `, unsafe score ${psa.unsafe_score.toFixed(3)}`;
  const hint = psa.hint ? `; hint to the model: ${psa.hint}` : "";
  return `${psa.action} (${psa.rule})${risk}${score}${hint}`;
}

by("offer").hidden = document.documentElement.dataset.explains === undefined;
by("file").onchange = (event) => show(event.target.files[0]);
by("drop").ondragover = (event) => { event.preventDefault(); by("drop").classList.add("over"); };
by("drop").ondragleave = () => by("drop").classList.remove("over");
by("drop").ondrop = (event) => {
  event.preventDefault();
  by("drop").classList.remove("over");
  show(event.dataTransfer.files[0]);
};

by("form").onsubmit = async (event) => {
  event.preventDefault();
  by("ask").disabled = true;
  const content = [{ type: "text", text: by("question").value }];
  if (picture) content.unshift({ type: "image_url", image_url: { url: picture } });
  const headers = { "content-type": "application/json" };
  if (by("key").value) headers.authorization = `Bearer ${by("key").value}`;
  const body = { model: document.documentElement.dataset.model, messages: [{ role: "user", content }] };
  if (by("explain").checked) body.psa = { explain: true };
  try {
    const reply = await fetch("/v1/chat/completions", { method: "POST", headers, body: JSON.stringify(body) });
    const said = await reply.json();
    if (said.error) say("error", said.error.message, `not answered (${reply.status})`, []);
    else say(said.psa.action, said.choices[0].message.content, describe(said.psa),
             Object.entries(said.psa.type_probs ?? {}), said.psa.explanation);
  } catch (error) {
    say("error", String(error), "the server was not reached", []);
  } finally {
    by("ask").disabled = false;
  }
};
