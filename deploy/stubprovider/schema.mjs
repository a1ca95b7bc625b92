// Writes schema.json: the attributes and blocks of the resources and data sources that
// the Terraform files below a folder use, as the AWS provider defines them. The source
// is the npm package @cdktf/provider-aws, which is generated from the provider.
//
//   npm pack @cdktf/provider-aws && tar xzf cdktf-provider-aws-*.tgz
//   node schema.mjs package ../terraform >schema.json
import { readFileSync, readdirSync } from "node:fs";
import { join } from "node:path";

const [lib, terraform] = [join(process.argv[2], "lib"), process.argv[3]];
const simple = { string: "string", number: "number", boolean: "bool", any: "dynamic" };

// body returns the text between the brace at or after start and its counterpart.
function body(text, start) {
  let depth = 0;
  for (let i = text.indexOf("{", start); i < text.length; i++) {
    if (text[i] === "{") depth++;
    if (text[i] === "}" && --depth === 0) return text.slice(text.indexOf("{", start) + 1, i);
  }
  throw new Error("unbalanced braces");
}

const snake = (s) => s.replace(/[A-Z]/g, (c) => "_" + c.toLowerCase()).replace(/([a-z])(\d)/g, "$1_$2");
// fold maps ipv6CidrBlock and ipv6_cidr_block to one word.
const fold = (s) => s.replace(/_/g, "").toLowerCase();

// settings returns whether each property of an interface is required, and whether there
// is at most one of a block.
function settings(types, name) {
  const found = new Map();
  const start = types.search(new RegExp(`export interface ${name}\\b`));
  if (start < 0) return found;
  for (const [, property, optional, type] of body(types, start).matchAll(/readonly (\w+)(\??): ([^;]+);/g)) {
    found.set(fold(property), { required: optional === "", single: !type.includes("[]") });
  }
  return found;
}

function attributeType(kind, storage) {
  const element = storage.replace(/(List|Map)$/, "").replace(/(List|Map)$/, "");
  const inner = simple[element] ?? "dynamic";
  if (kind === "simple") return simple[storage] ?? "dynamic";
  return [kind, inner];
}

// block reads the object literal of a function that lists attributes.
function block(data, code, types, literal, interfaceName) {
  const known = settings(types, interfaceName);
  const out = { attributes: {}, blocks: {} };
  for (const m of literal.matchAll(/(\w+): \{\s*value: (.*),\s*isBlock: (true|false),\s*type: "(\w+)",\s*storageClassType: "(\w+)",/g)) {
    const [, name, value, isBlock, kind, storage] = m;
    const setting = known.get(fold(name)) ?? { required: false, single: false };
    const nested = value.match(/(\w+)ToHclTerraform/);
    if (isBlock === "false" || !nested) {
      // The package does not tell which optional attributes AWS may set: those of data
      // sources are taken for such, and those of resources are not.
      const computed = data || name === "id";
      out.attributes[name] = { type: attributeType(kind, storage), ...(setting.required ? { required: true } : { optional: true, computed }), ...(name.endsWith("_wo") ? { write_only: true } : {}) };
      continue;
    }
    const type = nested[1][0].toUpperCase() + nested[1].slice(1);
    const at = code.indexOf(`function ${nested[1]}ToHclTerraform(`);
    out.blocks[name] = { nesting: kind === "map" ? "map" : kind, ...(setting.single ? { max: 1 } : {}), ...(setting.required ? { min: 1 } : {}), block: block(data, code, types, body(code, code.indexOf("const attrs = ", at)), type) };
  }
  return out;
}

function definition(kind, type) {
  const folder = (kind === "data" ? "data-" : "") + (kind === "data" ? type : type.replace(/^aws_/, "")).replace(/_/g, "-");
  const code = readFileSync(join(lib, folder, "index.js"), "utf8");
  const types = readFileSync(join(lib, folder, "index.d.ts"), "utf8");
  const [, name] = types.match(/export declare class (\w+) extends cdktf\.Terraform(?:Resource|DataSource)/);
  const synthesis = code.lastIndexOf("synthesizeHclAttributes()");
  const out = block(kind === "data", code, types, body(code, code.indexOf("const attrs = ", synthesis)), name + "Config");
  // Attributes that can only be read.
  const getters = { String: "string", Number: "number", Boolean: "bool", List: ["list", "string"], StringMap: ["map", "string"] };
  const declared = code.slice(code.indexOf(`class ${name} extends`));
  for (const [, getter, attribute] of declared.matchAll(/return (?:cdktf\.Fn\.tolist\()?this\.get(String|Number|Boolean|List|StringMap)Attribute\('(\w+)'\)/g)) {
    if (!out.attributes[attribute] && !out.blocks[attribute]) out.attributes[attribute] = { type: getters[getter], computed: true };
  }
  return out;
}

const used = { resource: new Set(), data: new Set() };
for (const file of readdirSync(terraform, { recursive: true })) {
  if (!/\.(tf|hcl)$/.test(file) || file.includes(".terraform/")) continue;
  for (const [, kind, type] of readFileSync(join(terraform, file), "utf8").matchAll(/^\s*(resource|data) "(aws_\w+)"/gm)) used[kind].add(type);
}
const version = readFileSync(join(process.argv[2], "lib/provider/index.js"), "utf8").match(/providerVersion: '([\d.]+)'/)[1];
const schema = { source: "AWS provider " + version, resource: {}, data: {} };
for (const kind of ["resource", "data"]) for (const type of [...used[kind]].sort()) schema[kind][type] = definition(kind, type);
// One line for each type.
const lines = (kind) => Object.entries(schema[kind]).map(([type, b]) => `  ${JSON.stringify(type)}: ${JSON.stringify(b)}`).join(",\n");
console.log(`{\n "source": ${JSON.stringify(schema.source)},\n "resource": {\n${lines("resource")}\n },\n "data": {\n${lines("data")}\n }\n}`);
