// Package manpage describes the commands of a program for its manual page. The rest of
// the page is in packaging/man.
package manpage

import (
	"fmt"
	"reflect"
	"strings"

	"github.com/alecthomas/kong"
)

// Commands returns the commands of a program that are not hidden, in Markdown: a heading
// of the third level for each, its help, and a list of its options.
func Commands(program *kong.Application) string {
	var b strings.Builder
	for _, c := range program.Leaves(true) {
		fmt.Fprintf(&b, "\n### %s\n\n%s\n", synopsis(c), escape(c.Help))
		for _, f := range c.Flags {
			if f.Hidden {
				continue
			}
			fmt.Fprintf(&b, "\n%s\n: %s\n", option(f), description(f))
		}
		for _, paragraph := range strings.Split(c.Detail, "\n\n") {
			switch {
			case paragraph == "":
			case strings.HasPrefix(paragraph, "  "): // lines to keep apart
				fmt.Fprintf(&b, "\n```\n%s\n```\n", paragraph)
			default:
				fmt.Fprintf(&b, "\n%s\n", escape(paragraph))
			}
		}
	}
	b.WriteString("\n")
	return b.String()
}

// synopsis returns a command with its required options and its arguments.
func synopsis(c *kong.Node) string {
	parts := []string{"**" + escape(c.FullPath()) + "**"}
	optional := false
	for _, f := range c.Flags {
		switch {
		case f.Hidden:
		case f.Required:
			parts = append(parts, option(f))
		default:
			optional = true
		}
	}
	if optional {
		parts = append(parts, `\[*options*\]`)
	}
	for _, arg := range c.Positional {
		text := "*" + escape(strings.ToUpper(arg.Name)) + "*"
		if arg.IsSlice() {
			text += " ..."
		}
		if !arg.Required {
			text = `\[` + text + `\]`
		}
		parts = append(parts, text)
	}
	return strings.Join(parts, " ")
}

// option returns the name of an option, with the placeholder of its value.
func option(f *kong.Flag) string {
	name := "**--" + escape(f.Name) + "**"
	if f.Tag.Negatable != "" {
		name += ", **--no-" + escape(f.Name) + "**"
	}
	if f.IsBool() {
		return name
	}
	placeholder := f.PlaceHolder
	if placeholder == "" {
		placeholder = strings.ToUpper(typeName(f.Target.Type()))
	}
	return name + "=*" + escape(placeholder) + "*"
}

// typeName returns the name of a type, and of a slice the name of its elements' type.
func typeName(t reflect.Type) string {
	if t.Kind() == reflect.Slice {
		t = t.Elem()
	}
	return t.Name()
}

// description returns the help of an option, with its default unless the help has it.
func description(f *kong.Flag) string {
	text := escape(f.Help)
	if f.HasDefault && !f.IsBool() && !strings.Contains(strings.ToLower(f.Help), "default") {
		text += " Default: " + escape(f.Default) + "."
	}
	return text
}

// escape returns text so that Markdown shows it as it is.
func escape(text string) string {
	return strings.NewReplacer(`\`, `\\`, "*", `\*`, "_", `\_`, "<", `\<`, "[", `\[`, "`", "\\`").Replace(text)
}
