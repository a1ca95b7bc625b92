package dynamo

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"strings"

	"github.com/aws/aws-sdk-go-v2/service/dynamodb/types"
)

// keptNonces is how many writers an item of Update names. If a gateway's reply is
// lost, it finds its nonce there, even though others have written since.
const keptNonces = 10

// maxUpdates bounds the attempts of an Update: each fails only because another
// gateway has changed the same value meanwhile.
const maxUpdates = 20

// Update changes a small value that the gateways share, by its user and its name:
// change is given the present value, empty if there is none, and returns the next
// one. An error of change is returned, and nothing is written; nor is it if the
// value stays the same. Change is called again if another gateway has changed the
// value meanwhile, so it must depend on its argument only.
func (t *Table) Update(ctx context.Context, user, name string, change func(old string) (string, error)) error {
	key := t.key("u/"+t.deployment+"/"+user, "state/"+name)
	for range maxUpdates {
		item, err := t.get(ctx, key)
		if err != nil {
			return fmt.Errorf("reading %s of %s: %w", name, user, err)
		}
		p := parser{item: item}
		version, old := p.number("version"), p.text("value")
		if p.err != nil {
			return fmt.Errorf("reading %s of %s: %w", name, user, p.err)
		}
		next, err := change(old)
		if err != nil || next == old {
			return err
		}
		nonces := append([]string{rand.Text()}, strings.Fields(p.text("nonce"))...)
		nonces = nonces[:min(len(nonces), keptNonces)]
		err = t.put(ctx, key, version, strings.Join(nonces, " "), map[string]types.AttributeValue{"value": &types.AttributeValueMemberS{Value: next}})
		if !errors.Is(err, errConflict) {
			if err != nil {
				err = fmt.Errorf("writing %s of %s: %w", name, user, err)
			}
			return err
		}
	}
	return fmt.Errorf("writing %s of %s: other gateways changed it %d times meanwhile", name, user, maxUpdates)
}
