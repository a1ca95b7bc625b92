package manpage

import (
	"testing"
	"time"

	"github.com/alecthomas/kong"
)

type program struct {
	Serve  serve `cmd:"" help:"Serve until SIGTERM."`
	Ledger struct {
		Copy struct {
			File []string `arg:"" optional:"" name:"file" help:"A file."`
		} `cmd:"" help:"Copy a_file."`
	} `cmd:"" help:"Ledgers."`
	Secret struct{} `cmd:"" hidden:"" help:"Not shown."`
}

type serve struct {
	Config string        `required:"" placeholder:"FILE" help:"The file, as <name>."`
	Idle   time.Duration `default:"15m" help:"How long to wait."`
	Max    []int         `default:"1" help:"Limits (default 1)."`
	Colour *bool         `negatable:"" help:"Use colours."`
	Hidden string        `hidden:"" help:"Not shown."`
}

func (serve) Help() string { return "Load it:\n\n  serve *.x\n\nThat is all." }

const want = `
### **gw serve** **--config**=*FILE* \[*options*\]

Serve until SIGTERM.

**--config**=*FILE*
: The file, as \<name>.

**--idle**=*DURATION*
: How long to wait. Default: 15m.

**--max**=*INT*
: Limits (default 1).

**--colour**, **--no-colour**
: Use colours.

Load it:

` + "```\n  serve *.x\n```" + `

That is all.

### **gw ledger copy** \[*FILE* ...\]

Copy a\_file.

`

func TestCommands(t *testing.T) {
	parser, err := kong.New(&program{}, kong.Name("gw"))
	if err != nil {
		t.Fatal(err)
	}
	if got := Commands(parser.Model); got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
}
