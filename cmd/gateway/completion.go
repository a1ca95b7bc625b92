package main

import (
	"bytes"
	"fmt"
	"reflect"
	"slices"
	"strings"

	"github.com/alecthomas/kong"
)

type completionCmd struct {
	Shell string `arg:"" enum:"bash,zsh,fish" help:"bash, zsh or fish."`
}

// Help implements [kong.HelpProvider].
func (completionCmd) Help() string {
	return `Load it in the current shell with

  bash:  source <(gateway completion bash)
  zsh:   source <(gateway completion zsh)     (after compinit)
  fish:  gateway completion fish | source

or install it:

  bash:  /etc/bash_completion.d/gateway
  zsh:   /usr/local/share/zsh/site-functions/_gateway
  fish:  /etc/fish/completions/gateway.fish`
}

// Run prints the script.
func (c *completionCmd) Run(k *kong.Context, s streams) error {
	var script bytes.Buffer
	map[string]func(*bytes.Buffer, []*kong.Node){"bash": bashCompletion, "zsh": zshCompletion, "fish": fishCompletion}[c.Shell](&script, visible(k.Model.Children))
	_, err := s.out.Write(script.Bytes())
	return err
}

// completes returns the values that a flag or an argument takes: one of words, or, if
// words is nil and file is set, the path of a file.
func completes(v *kong.Value) (words []string, file bool) {
	if v.Enum != "" {
		return strings.Split(v.Enum, ","), false
	}
	kind := v.Target.Type()
	if kind.Kind() == reflect.Slice {
		kind = kind.Elem()
	}
	return nil, kind.Kind() == reflect.String && (v.Tag.PlaceHolder == "FILE" || v.Tag.PlaceHolder == "DIR")
}

// visible returns the commands that are not hidden.
func visible(commands []*kong.Node) []*kong.Node {
	return slices.DeleteFunc(slices.Clone(commands), func(n *kong.Node) bool { return n.Hidden })
}

// flagsOf returns the flags of a command and of its subcommands, --help included.
func flagsOf(n *kong.Node) []*kong.Flag {
	var flags []*kong.Flag
	for _, command := range append(visible(n.Children), n) {
		for _, group := range command.AllFlags(true) {
			for _, f := range group {
				if !slices.ContainsFunc(flags, func(g *kong.Flag) bool { return g.Name == f.Name }) {
					flags = append(flags, f)
				}
			}
		}
	}
	return flags
}

// argumentWords returns the values that the arguments of a command take, or nil.
func argumentWords(n *kong.Node, commands []*kong.Node) []string {
	if n.Name == "help" {
		return names(commands)
	}
	if len(n.Children) > 0 {
		return names(n.Children)
	}
	for _, arg := range n.Positional {
		if words, _ := completes(arg); words != nil {
			return words
		}
	}
	return nil
}

// takesFile reports whether an argument of the command is a file.
func takesFile(n *kong.Node) bool {
	return slices.ContainsFunc(n.Positional, func(arg *kong.Positional) bool { _, file := completes(arg); return file })
}

func names(commands []*kong.Node) []string {
	var all []string
	for _, n := range commands {
		all = append(all, n.Name)
	}
	return all
}

func bashCompletion(w *bytes.Buffer, commands []*kong.Node) {
	fmt.Fprintf(w, `_gateway() {
	local cur=${COMP_WORDS[COMP_CWORD]} words
	if ((COMP_CWORD == 1)); then
		words=%q
	else
		case ${COMP_WORDS[1]} in
`, strings.Join(append(names(commands), "--help", "--version"), " "))
	var takeWords []string // the commands whose arguments are words, not files
	for _, n := range commands {
		words := argumentWords(n, commands)
		if words != nil {
			takeWords = append(takeWords, n.Name)
		}
		for _, f := range flagsOf(n) {
			words = append(words, "--"+f.Name)
		}
		fmt.Fprintf(w, "\t\t%s) words=%q ;;\n", n.Name, strings.Join(words, " "))
	}
	fmt.Fprintf(w, `		esac
	fi
	# Without a match, -o default completes files.
	COMPREPLY=()
	if ((COMP_CWORD == 1)) || [[ $cur == -* || ${COMP_WORDS[1]} == @(%s) ]]; then
		COMPREPLY=($(compgen -W "$words" -- "$cur"))
	fi
}
complete -o default -F _gateway gateway
`, strings.Join(takeWords, "|"))
}

func zshCompletion(w *bytes.Buffer, commands []*kong.Node) {
	quote := func(s string) string { return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'" }
	escape := strings.NewReplacer("[", `\[`, "]", `\]`, ":", `\:`).Replace
	w.WriteString("#compdef gateway\n\n_gateway() {\n\tlocal -a commands\n\tcommands=(\n")
	for _, n := range commands {
		fmt.Fprintf(w, "\t\t%s\n", quote(n.Name+":"+escape(n.Help)))
	}
	w.WriteString("\t)\n\tif ((CURRENT == 2)); then\n\t\t_describe command commands\n\t\t_arguments --help --version\n\t\treturn\n\tfi\n\tlocal command=$words[2]\n\twords=($words[2,-1])\n\t((CURRENT--))\n\tcase $command in\n")
	for _, n := range commands {
		fmt.Fprintf(w, "\t%s) _arguments", n.Name)
		for _, f := range flagsOf(n) {
			spec := "--" + f.Name
			if !f.IsBool() {
				spec += "="
			}
			spec += "[" + escape(f.Help) + "]"
			if !f.IsBool() {
				spec += ":" + f.Name + ":"
				if _, file := completes(f.Value); file {
					spec += "_files"
				}
			}
			fmt.Fprintf(w, " \\\n\t\t%s", quote(spec))
		}
		if words := argumentWords(n, commands); words != nil {
			fmt.Fprintf(w, " \\\n\t\t%s", quote("*: :("+strings.Join(words, " ")+")"))
		} else if takesFile(n) {
			fmt.Fprintf(w, " \\\n\t\t%s", quote("*: :_files"))
		}
		w.WriteString(" ;;\n")
	}
	// The else is for the script as a file in fpath, which zsh loads as a function.
	w.WriteString("\tesac\n}\n\nif [[ $funcstack[1] != _gateway ]]; then\n\tcompdef _gateway gateway\nelse\n\t_gateway \"$@\"\nfi\n")
}

func fishCompletion(w *bytes.Buffer, commands []*kong.Node) {
	quote := func(s string) string {
		return "'" + strings.NewReplacer(`\`, `\\`, "'", `\'`).Replace(s) + "'"
	}
	const none = "-n __fish_use_subcommand"
	w.WriteString("complete -c gateway -f\n")
	fmt.Fprintf(w, "complete -c gateway %s -l help -d 'Show help.'\ncomplete -c gateway %s -l version -d 'Print the version.'\n", none, none)
	for _, n := range commands {
		fmt.Fprintf(w, "complete -c gateway %s -a %s -d %s\n", none, n.Name, quote(n.Help))
		seen := "-n " + quote("__fish_seen_subcommand_from "+n.Name)
		for _, f := range flagsOf(n) {
			takes := ""
			if words, file := completes(f.Value); words != nil {
				takes = " -x -a " + quote(strings.Join(words, " "))
			} else if file {
				takes = " -r -F"
			} else if !f.IsBool() {
				takes = " -x"
			}
			fmt.Fprintf(w, "complete -c gateway %s -l %s%s -d %s\n", seen, f.Name, takes, quote(f.Help))
		}
		if words := argumentWords(n, commands); words != nil {
			fmt.Fprintf(w, "complete -c gateway %s -a %s\n", seen, quote(strings.Join(words, " ")))
		} else if takesFile(n) {
			fmt.Fprintf(w, "complete -c gateway %s -F\n", seen)
		}
	}
}
