package dynamo

import (
	"context"
	"fmt"

	"github.com/aws/aws-sdk-go-v2/service/dynamodb"
	"github.com/aws/aws-sdk-go-v2/service/dynamodb/types"
)

// revokedPrefix begins the sort key of a revoked user. The items of all users are in the
// deployment's partition, so that one Query reads them.
const revokedPrefix = "revoked/"

// Revoked implements [revoked.Store].
func (t *Table) Revoked(ctx context.Context) (map[string]string, error) {
	items, err := t.query(ctx, "d/"+t.deployment, revokedPrefix)
	if err != nil {
		return nil, err
	}
	texts := make(map[string]string)
	for _, item := range items {
		p := parser{item: item}
		user, text := p.text(sortKey)[len(revokedPrefix):], p.text("value")
		if p.err != nil {
			text = "" // not a text that this package has written, so a malformed entry
		}
		texts[user] = text
	}
	return texts, nil
}

// SetRevoked implements [revoked.Store]. The last write stands.
func (t *Table) SetRevoked(ctx context.Context, user, text string) error {
	key := t.key("d/"+t.deployment, revokedPrefix+user)
	if text == "" {
		if _, err := t.client.DeleteItem(ctx, &dynamodb.DeleteItemInput{TableName: &t.name, Key: key}); err != nil {
			return fmt.Errorf("DeleteItem in %s: %w", t.name, err)
		}
		return nil
	}
	key["value"] = &types.AttributeValueMemberS{Value: text}
	if _, err := t.client.PutItem(ctx, &dynamodb.PutItemInput{TableName: &t.name, Item: key}); err != nil {
		return fmt.Errorf("PutItem in %s: %w", t.name, err)
	}
	return nil
}
