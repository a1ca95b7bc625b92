package config

import (
	"fmt"
	"strings"

	"go.yaml.in/yaml/v4"
)

// A value is a node of the file. Its methods read it as one type; if it is not of
// that type, they report the mistake and return a zero value.
type value struct {
	node   *yaml.Node // nil: an empty file
	name   string     // as in profiles.default.idle; empty for the root
	dir    string     // base of relative paths; empty: there is none
	aws    *AWS       // may be nil
	copies *copies
	*report
}

// mistake reports a mistake at this value.
func (v value) mistake(format string, args ...any) {
	text := fmt.Sprintf(format, args...)
	if v.name != "" {
		text = v.name + ": " + text
	}
	v.add(v.line(), "%s", text)
}

func (v value) line() int {
	if v.node == nil {
		return 0
	}
	return v.node.Line
}

// place returns the file, the line and the name of this value, for mistakes that are
// found later.
func (v value) place() string { return fmt.Sprintf("%s:%d: %s", v.report.file, v.line(), v.name) }

// resolve returns the target of an alias.
func resolve(n *yaml.Node) *yaml.Node {
	if n != nil && n.Kind == yaml.AliasNode {
		return n.Alias
	}
	return n
}

func (v value) isNull() bool {
	n := resolve(v.node)
	return n == nil || n.Kind == yaml.ScalarNode && n.ShortTag() == "!!null"
}

// child returns the value called name in v.
func (v value) child(name string, node *yaml.Node) value {
	if v.name != "" {
		name = v.name + "." + name
	}
	v.name, v.node = name, node
	return v
}

// entries calls f for each entry of a mapping, in the order of the file. An
// empty value is a mapping without entries.
func (v value) entries(f func(name string, v value)) {
	if v.isNull() {
		return
	}
	node := resolve(v.node)
	if node.Kind != yaml.MappingNode {
		v.mistake("must have keys and values under it")
		return
	}
	lines := map[string]int{}
	for i := 0; i+1 < len(node.Content); i += 2 {
		k, content := resolve(node.Content[i]), node.Content[i+1]
		name := k.Value
		entry := v.child(name, content)
		switch {
		case k.Kind != yaml.ScalarNode || name == "":
			v.child("?", node.Content[i]).mistake("a key must be a word")
			continue
		case name == "<<":
			v.child("<<", node.Content[i]).mistake("merging is not supported; write the values out, or use an alias for one value")
			continue
		case lines[name] > 0:
			v.child(name, node.Content[i]).mistake("given twice; the first is in line %d", lines[name])
			continue
		}
		lines[name] = node.Content[i].Line
		// A list or mapping is reported at the line of its key.
		if content.Kind != yaml.ScalarNode {
			at := *content
			at.Line = node.Content[i].Line
			entry.node = &at
		}
		f(name, entry)
	}
}

// mapping reads each entry with the function for its key, and returns the keys that
// the file has.
func (v value) mapping(fields map[string]func(value)) map[string]bool {
	seen := map[string]bool{}
	v.entries(func(name string, v value) {
		read, ok := fields[name]
		switch {
		case !ok:
			v.mistake("%s", unknown(name, fields))
			return
		case v.isNull() && name != "profiles" && name != "local" && name != "fargate": // empty mappings are fine
			v.mistake("has no value")
		default:
			read(v)
		}
		seen[name] = true
	})
	return seen
}

// unknown returns the text for an unknown key, with a similar one if there is any.
func unknown(name string, fields map[string]func(value)) string {
	best, distance := "", 3
	for known := range fields {
		if d := editDistance(fold(name), fold(known)); d < distance || d == distance && known < best {
			best, distance = known, d
		}
	}
	if best == "" {
		return "unknown key"
	}
	return "unknown key; do you mean " + best + "?"
}

// fold maps HostKeys, host-keys and host_keys to one word.
func fold(s string) string {
	return strings.ToLower(strings.NewReplacer("_", "", "-", "").Replace(s))
}

// editDistance returns the Levenshtein distance of a and b in bytes. If a is long it
// returns its length, to limit the time.
func editDistance(a, b string) int {
	if len(a) > 64 {
		return len(a)
	}
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := diagonal
			if a[i] != b[j] {
				cost++
			}
			diagonal = row[j+1]
			row[j+1] = min(cost, row[j]+1, row[j+1]+1)
		}
	}
	return row[len(b)]
}

// lineOf returns the line of the key called name in v, or 0.
func (v value) lineOf(name string) int {
	line := 0
	quiet := v
	quiet.report = &report{}
	quiet.entries(func(n string, v value) {
		if n == name {
			line = v.node.Line
		}
	})
	return line
}

// list returns the values of a list. A single value is a list of one.
func (v value) list() []value {
	node := resolve(v.node)
	switch node.Kind {
	case yaml.ScalarNode:
		return []value{v}
	case yaml.SequenceNode:
		if len(node.Content) == 0 {
			v.mistake("the list is empty")
		}
		var vs []value
		for _, n := range node.Content {
			item := v
			item.node = n
			if item.isNull() {
				item.mistake("the list has an empty entry")
				continue
			}
			vs = append(vs, item)
		}
		return vs
	}
	v.mistake("must be a list, or a single value")
	return nil
}

// text returns a scalar as it is written. If v is none, it reports that and returns
// false.
func (v value) text() (string, bool) {
	node := resolve(v.node)
	if node.Kind != yaml.ScalarNode {
		v.mistake("must be a single value")
		return "", false
	}
	return node.Value, true
}

// is reports whether v is the given word.
func (v value) is(word string) bool {
	node := resolve(v.node)
	return node.Kind == yaml.ScalarNode && node.Value == word
}
