"""The page's style sheet; colours of single specialists are added by `page.py`.

`--most` is the opacity of the strongest colour behind a token: text on it keeps a contrast of 4.5 in both schemes.
"""

SHEET = """\
:root {
  color-scheme: light dark;
  --paper: #ffffff;
  --ink: #16181d;
  --faint: #5c636e;
  --box: #f3f4f6;
  --rule: #d5d8de;
  --lift: 0%;
  --most: 0.6;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14161a;
    --ink: #f2f3f5;
    --faint: #a5acb8;
    --box: #1f2228;
    --rule: #3a3f48;
    --lift: 30%;
    --most: 0.4;
  }
}
* {
  box-sizing: border-box;
}
body {
  margin: 0 auto;
  max-width: 62rem;
  padding: 1.5rem;
  background: var(--paper);
  color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif;
}
h1 {
  font-size: 1.5rem;
  margin: 0;
}
h2 {
  font-size: 1.1rem;
  margin: 0;
}
section {
  border-top: 1px solid var(--rule);
  margin-top: 2rem;
  padding-top: 1rem;
}
section > p {
  color: var(--faint);
  margin: 0 0 0.75rem;
}
.legend {
  list-style: none;
  padding: 0;
  display: grid;
  gap: 0.4rem;
}
.legend b {
  display: inline-block;
  min-width: 5rem;
}
.legend span {
  padding: 0.1rem 0.5rem;
  font: 0.85rem ui-monospace, monospace;
}
.prompt, .response {
  white-space: pre-wrap;
  overflow-wrap: anywhere;
  tab-size: 4;
  font: 0.9rem/1.9 ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace;
}
.prompt {
  background: var(--box);
  color: var(--faint);
  max-height: 10.5rem;
  overflow: auto;
  padding: 0.4rem 0.75rem;
  line-height: 1.5;
  border-radius: 0.3rem;
}
.response {
  padding: 0.5rem 0.75rem 0.75rem;
}
.t, .legend b, .legend span {
  background: rgb(var(--own) / calc(var(--strength) * var(--most)));
  text-decoration-line: underline;
  text-decoration-color: color-mix(in srgb, rgb(var(--own)), white var(--lift));
  text-decoration-thickness: 2px;
  text-underline-offset: 4px;
  text-decoration-skip-ink: none;
}
.t:hover {
  outline: 2px solid var(--ink);
}
.part::before {
  content: "\\00b7";
}
.end::before {
  content: "\\21b5";
  color: var(--faint);
  font-style: normal;
}
details {
  margin-top: 0.5rem;
  overflow-x: auto;
}
summary {
  cursor: pointer;
  color: var(--faint);
}
table {
  border-collapse: collapse;
  font: 0.85rem ui-monospace, monospace;
}
th, td {
  padding: 0.1rem 0.75rem;
  text-align: right;
  border-bottom: 1px solid var(--rule);
}
.piece {
  text-align: left;
  white-space: pre;
}
"""
