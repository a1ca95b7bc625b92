package dynamo

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/aws/aws-sdk-go-v2/service/dynamodb"
	"github.com/aws/aws-sdk-go-v2/service/dynamodb/types"
)

// A Gateway is the heartbeat of one gateway of the deployment.
type Gateway struct {
	// ID is the gateway's own, by which others call it: one word.
	ID string
	// Version is that of its program.
	Version string
	// Address is the "host:port" at which other gateways reach its SSH port; empty
	// if it is not known.
	Address string
	// Settings is a hash of the settings in which all gateways of a deployment
	// must agree.
	Settings string
	// Draining says that it takes no new connections.
	Draining bool
	// Connections is the number of its users' connections.
	Connections int
	// Started is when its process began, and Seen when this was written, both by
	// its own clock.
	Started, Seen time.Time
}

// Beat writes the gateway's heartbeat. The last one stands.
func (t *Table) Beat(ctx context.Context, g Gateway) error {
	item := t.key("d/"+t.deployment, "gateway/"+g.ID)
	for name, value := range map[string]string{
		"program": g.Version, "settings": g.Settings, "address": g.Address,
		"started": g.Started.UTC().Format(time.RFC3339Nano), "seen": g.Seen.UTC().Format(time.RFC3339Nano),
	} {
		item[name] = &types.AttributeValueMemberS{Value: value}
	}
	item["draining"] = &types.AttributeValueMemberBOOL{Value: g.Draining}
	item["connections"] = number(int64(g.Connections))
	if _, err := t.client.PutItem(ctx, &dynamodb.PutItemInput{TableName: &t.name, Item: item}); err != nil {
		return fmt.Errorf("writing the heartbeat of %s: PutItem in %s: %w", g.ID, t.name, err)
	}
	return nil
}

// Leave removes the heartbeat of a gateway that has ended.
func (t *Table) Leave(ctx context.Context, id string) error {
	_, err := t.client.DeleteItem(ctx, &dynamodb.DeleteItemInput{TableName: &t.name, Key: t.key("d/"+t.deployment, "gateway/"+id)})
	if err != nil {
		return fmt.Errorf("removing the heartbeat of %s: DeleteItem in %s: %w", id, t.name, err)
	}
	return nil
}

// Gateways returns the heartbeats of the deployment's gateways in the order of
// their IDs, those of gateways that died without Leave included.
func (t *Table) Gateways(ctx context.Context) ([]Gateway, error) {
	items, err := t.query(ctx, "d/"+t.deployment, "gateway/")
	if err != nil {
		return nil, fmt.Errorf("listing the gateways: %w", err)
	}
	var all []Gateway
	for _, item := range items {
		p := parser{item: item}
		g := Gateway{
			ID:          p.text(sortKey)[len("gateway/"):],
			Version:     p.text("program"),
			Address:     p.text("address"),
			Settings:    p.text("settings"),
			Connections: int(p.number("connections")),
			Started:     p.moment("started"),
			Seen:        p.moment("seen"),
		}
		if draining, ok := item["draining"].(*types.AttributeValueMemberBOOL); ok {
			g.Draining = draining.Value
		}
		if p.err != nil {
			return nil, fmt.Errorf("listing the gateways: %s: %w", g.ID, p.err)
		}
		all = append(all, g)
	}
	slices.SortFunc(all, func(a, b Gateway) int { return cmp.Compare(a.ID, b.ID) })
	return all, nil
}
