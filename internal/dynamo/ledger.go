package dynamo

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/aws/aws-sdk-go-v2/service/dynamodb/types"
	"golang.org/x/crypto/ssh"

	"github.com/sallyport-ssh/sallyport/internal/bastion"
)

func (t *Table) ownerKey(owner bastion.Owner) map[string]types.AttributeValue {
	return t.key("u/"+t.deployment+"/"+owner.User, "bastion/"+owner.Profile)
}

// Get implements [bastion.Ledger] with a strongly consistent read.
func (t *Table) Get(ctx context.Context, owner bastion.Owner) (bastion.Entry, error) {
	item, err := t.get(ctx, t.ownerKey(owner))
	if err != nil {
		return bastion.Entry{}, fmt.Errorf("reading the ledger: %w", err)
	}
	if item == nil {
		return bastion.Entry{}, nil
	}
	entry, err := parseEntry(item)
	if err != nil {
		return bastion.Entry{}, fmt.Errorf("reading the ledger: the item of %s in %s: %w", owner, t.name, err)
	}
	return entry, nil
}

// Swap implements [bastion.Ledger] with a conditional write.
func (t *Table) Swap(ctx context.Context, owner bastion.Owner, old, new bastion.Entry) (bastion.Entry, error) {
	new.Version = old.Version + 1
	err := t.put(ctx, t.ownerKey(owner), old.Version, new.Nonce, formatEntry(new))
	if errors.Is(err, errConflict) {
		return bastion.Entry{}, fmt.Errorf("%w: %s is past version %d", bastion.ErrConflict, owner, old.Version)
	}
	if err != nil {
		return bastion.Entry{}, fmt.Errorf("writing the ledger: %w", err)
	}
	return new, nil
}

// states are the values of the attribute state.
var states = map[bastion.State]string{bastion.Idle: "idle", bastion.Starting: "starting", bastion.Running: "running"}

func formatEntry(e bastion.Entry) map[string]types.AttributeValue {
	item := map[string]types.AttributeValue{
		"version":    number(e.Version), // as put sets it, too
		"generation": number(e.Generation),
		"state":      &types.AttributeValueMemberS{Value: states[e.State]},
	}
	text := func(name, value string) {
		if value != "" {
			item[name] = &types.AttributeValueMemberS{Value: value}
		}
	}
	moment := func(name string, t time.Time) {
		if !t.IsZero() {
			text(name, t.UTC().Format(time.RFC3339Nano))
		}
	}
	text("task", e.Task.ID)
	text("principal", e.Task.Principal)
	text("addr", e.Task.Addr)
	if e.Task.Generation != 0 {
		item["task_generation"] = number(e.Task.Generation)
	}
	if e.Task.HostKey != nil {
		text("host_key", strings.TrimSpace(string(ssh.MarshalAuthorizedKey(e.Task.HostKey))))
	}
	moment("since", e.Since)
	moment("lease", e.Lease)
	text("nonce", e.Nonce)
	return item
}

// parseEntry reads an item. An item that another program has changed is an error
// and not an unknown owner: a second bastion may not be started beside the one it
// names.
func parseEntry(item map[string]types.AttributeValue) (bastion.Entry, error) {
	p := parser{item: item}
	e := bastion.Entry{
		Version:    p.number("version"),
		Generation: p.number("generation"),
		Task: bastion.Task{
			ID:         p.text("task"),
			Principal:  p.text("principal"),
			Addr:       p.text("addr"),
			Generation: p.number("task_generation"),
		},
		Since: p.moment("since"),
		Lease: p.moment("lease"),
		Nonce: p.text("nonce"),
	}
	state := p.text("state")
	known := false
	for s, name := range states {
		if name == state {
			e.State, known = s, true
		}
	}
	if key := p.text("host_key"); key != "" {
		parsed, _, _, _, err := ssh.ParseAuthorizedKey([]byte(key))
		if err != nil {
			p.fail("host_key", err)
		}
		e.Task.HostKey = parsed
	}
	switch {
	case p.err != nil:
		return bastion.Entry{}, p.err
	case !known:
		return bastion.Entry{}, fmt.Errorf("attribute state is %q", state)
	case e.Version < 1, e.Generation < 0:
		return bastion.Entry{}, errors.New("attribute version or generation is out of range")
	case e.State == bastion.Running && (e.Task.ID == "" || e.Task.Addr == ""):
		return bastion.Entry{}, errors.New("attribute task or addr is missing")
	}
	return e, nil
}

// A parser reads attributes and keeps the first error. A missing attribute is a
// zero value.
type parser struct {
	item map[string]types.AttributeValue
	err  error
}

func (p *parser) fail(name string, err error) {
	if p.err == nil {
		p.err = fmt.Errorf("attribute %s: %w", name, err)
	}
}

func (p *parser) text(name string) string {
	switch value := p.item[name].(type) {
	case nil:
		return ""
	case *types.AttributeValueMemberS:
		return value.Value
	default:
		p.fail(name, errors.New("is not a string"))
		return ""
	}
}

func (p *parser) number(name string) int64 {
	switch value := p.item[name].(type) {
	case nil:
		return 0
	case *types.AttributeValueMemberN:
		n, err := strconv.ParseInt(value.Value, 10, 64)
		if err != nil {
			p.fail(name, err)
		}
		return n
	default:
		p.fail(name, errors.New("is not a number"))
		return 0
	}
}

func (p *parser) moment(name string) time.Time {
	text := p.text(name)
	if text == "" {
		return time.Time{}
	}
	t, err := time.Parse(time.RFC3339Nano, text)
	if err != nil {
		p.fail(name, err)
	}
	return t
}

func number(n int64) *types.AttributeValueMemberN {
	return &types.AttributeValueMemberN{Value: strconv.FormatInt(n, 10)}
}
