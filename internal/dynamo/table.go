// Package dynamo keeps the state that the gateways of a deployment share in a
// table of Amazon DynamoDB. [Table] implements [bastion.Ledger].
//
// # Items
//
// The partition key pk (a string) is the deployment and a user, or the deployment
// alone; the sort key sk (a string) is the kind of item, and a name where there may
// be several:
//
//	pk                    sk               content
//	u/DEPLOYMENT/USER     bastion/PROFILE  a bastion.Entry
//	u/DEPLOYMENT/USER     state/NAME       a value of Update
//	d/DEPLOYMENT          gateway/ID       a heartbeat, see Gateway
//	d/DEPLOYMENT          revoked/USER     a text about a revoked user
//	d/DEPLOYMENT          check            the time of the last Check
//
// So the items of one user are in one partition, and one Query reads them. No item
// holds a secret.
//
// # Consistency
//
// Every read is strongly consistent, and every write but heartbeats and revoked users
// is a PutItem that is conditional on the version that was read: DynamoDB orders the
// writes of all gateways. A lost reply is repeated by the SDK; the repeated write then fails its
// condition, and is recognised by its nonce. Clocks of gateways are not compared.
//
// # Permissions
//
// A gateway needs dynamodb:GetItem, PutItem, DeleteItem, Query and DescribeTable on
// the table; [Table.Create] needs CreateTable too.
package dynamo

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/aws/ratelimit"
	"github.com/aws/aws-sdk-go-v2/aws/retry"
	awshttp "github.com/aws/aws-sdk-go-v2/aws/transport/http"
	"github.com/aws/aws-sdk-go-v2/service/dynamodb"
	"github.com/aws/aws-sdk-go-v2/service/dynamodb/types"
	"github.com/aws/smithy-go/middleware"
)

// maxCalls limits the calls at a time; others wait. If a thousand users log in at once,
// that many calls at once would each need a connection, and have time limits that a table
// or a small machine cannot keep. At ten milliseconds a call, this is 2,000 calls a second.
const maxCalls = 20

// attemptTimeout bounds one attempt of a call. DynamoDB answers within some ten
// milliseconds; a call that is not answered is best repeated.
const attemptTimeout = 2 * time.Second

// A Table is one deployment's part of a table. [New] makes it. It is safe for
// concurrent use.
type Table struct {
	client     *dynamodb.Client
	name       string
	deployment string
}

// New returns the part of the named table that belongs to a deployment: letters,
// digits, "-" and "_". It makes no call.
func New(cfg aws.Config, name, deployment string) *Table {
	cfg = cfg.Copy()
	cfg.HTTPClient = awshttp.NewBuildableClient().WithTimeout(attemptTimeout).WithTransportOptions(func(tr *http.Transport) {
		tr.MaxIdleConnsPerHost = maxCalls
	})
	cfg.Retryer = func() aws.Retryer {
		return retry.NewStandard(func(o *retry.StandardOptions) {
			// By default, a client stops retrying after many failures, so that a
			// short failure would reject most users of a crowd.
			o.RateLimiter = ratelimit.None
		})
	}
	calls := make(chan struct{}, maxCalls)
	cfg.APIOptions = append(slices.Clip(cfg.APIOptions), func(stack *middleware.Stack) error {
		return stack.Finalize.Insert(middleware.FinalizeMiddlewareFunc("LimitCalls",
			func(ctx context.Context, in middleware.FinalizeInput, next middleware.FinalizeHandler) (middleware.FinalizeOutput, middleware.Metadata, error) {
				select {
				case calls <- struct{}{}:
				case <-ctx.Done():
					return middleware.FinalizeOutput{}, middleware.Metadata{}, context.Cause(ctx)
				}
				defer func() { <-calls }()
				return next.HandleFinalize(ctx, in)
			}), "Retry", middleware.After)
	})
	return &Table{client: dynamodb.NewFromConfig(cfg), name: name, deployment: deployment}
}

// The names of the key attributes.
const (
	partitionKey = "pk"
	sortKey      = "sk"
)

// Create makes the table with on-demand billing, point-in-time recovery off and
// deletion protection on, and waits until it can be used. It returns nil if there
// is such a table already.
func (t *Table) Create(ctx context.Context) error {
	_, err := t.client.CreateTable(ctx, &dynamodb.CreateTableInput{
		TableName: &t.name,
		AttributeDefinitions: []types.AttributeDefinition{
			{AttributeName: aws.String(partitionKey), AttributeType: types.ScalarAttributeTypeS},
			{AttributeName: aws.String(sortKey), AttributeType: types.ScalarAttributeTypeS},
		},
		KeySchema: []types.KeySchemaElement{
			{AttributeName: aws.String(partitionKey), KeyType: types.KeyTypeHash},
			{AttributeName: aws.String(sortKey), KeyType: types.KeyTypeRange},
		},
		BillingMode:               types.BillingModePayPerRequest,
		DeletionProtectionEnabled: aws.Bool(true),
	})
	var exists *types.ResourceInUseException
	if err != nil && !errors.As(err, &exists) {
		return fmt.Errorf("creating the table %s: %w", t.name, err)
	}
	active := dynamodb.NewTableExistsWaiter(t.client, func(o *dynamodb.TableExistsWaiterOptions) {
		o.MinDelay, o.MaxDelay = time.Second, 5*time.Second
	})
	if err := active.Wait(ctx, &dynamodb.DescribeTableInput{TableName: &t.name}, 5*time.Minute); err != nil {
		return fmt.Errorf("waiting for the table %s: %w", t.name, err)
	}
	return t.checkKeys(ctx)
}

// checkKeys returns an error if the table is missing or has other keys.
func (t *Table) checkKeys(ctx context.Context) error {
	out, err := t.client.DescribeTable(ctx, &dynamodb.DescribeTableInput{TableName: &t.name})
	if err != nil {
		return fmt.Errorf("DescribeTable %s: %w", t.name, explained(err))
	}
	var keys []string
	for _, element := range out.Table.KeySchema {
		kind := types.ScalarAttributeType("")
		for _, a := range out.Table.AttributeDefinitions {
			if aws.ToString(a.AttributeName) == aws.ToString(element.AttributeName) {
				kind = a.AttributeType
			}
		}
		keys = append(keys, fmt.Sprintf("%s %s %s", aws.ToString(element.AttributeName), element.KeyType, kind))
	}
	want := []string{partitionKey + " HASH S", sortKey + " RANGE S"}
	if !slices.Equal(keys, want) {
		return fmt.Errorf("the table %s has the keys %q, not %q; use another table", t.name, keys, want)
	}
	return nil
}

// explained adds the remedy to the error for a table that does not exist.
func explained(err error) error {
	if missing := (*types.ResourceNotFoundException)(nil); errors.As(err, &missing) {
		return fmt.Errorf("there is no such table in this account and Region; gateway ledger create-table makes it: %w", err)
	}
	return err
}

// Check proves that the table exists, has the right keys, and can be read and
// written with the credentials in use. It leaves one item behind, which each Check
// overwrites.
func (t *Table) Check(ctx context.Context) error {
	if err := t.checkKeys(ctx); err != nil {
		return err
	}
	key := t.key("d/"+t.deployment, "check")
	item := map[string]types.AttributeValue{"checked": &types.AttributeValueMemberS{Value: time.Now().UTC().Format(time.RFC3339)}}
	for name, value := range key {
		item[name] = value
	}
	if _, err := t.client.PutItem(ctx, &dynamodb.PutItemInput{TableName: &t.name, Item: item}); err != nil {
		return fmt.Errorf("PutItem in %s: %w", t.name, err)
	}
	if _, err := t.get(ctx, key); err != nil {
		return err
	}
	if _, err := t.query(ctx, "d/"+t.deployment, "check"); err != nil {
		return err
	}
	return nil
}

func (t *Table) key(pk, sk string) map[string]types.AttributeValue {
	return map[string]types.AttributeValue{
		partitionKey: &types.AttributeValueMemberS{Value: pk},
		sortKey:      &types.AttributeValueMemberS{Value: sk},
	}
}

// errConflict is the error of put if the item has another version.
var errConflict = errors.New("the item has changed")

// put writes an item whose version must still be old; zero is that of an item that
// does not exist. The attributes version and nonce are set here.
func (t *Table) put(ctx context.Context, key map[string]types.AttributeValue, old int64, nonces string, item map[string]types.AttributeValue) error {
	for name, value := range key {
		item[name] = value
	}
	item["version"] = number(old + 1)
	item["nonce"] = &types.AttributeValueMemberS{Value: nonces}
	put := &dynamodb.PutItemInput{
		TableName:                           &t.name,
		Item:                                item,
		ConditionExpression:                 aws.String("attribute_not_exists(#v)"),
		ExpressionAttributeNames:            map[string]string{"#v": "version"},
		ReturnValuesOnConditionCheckFailure: types.ReturnValuesOnConditionCheckFailureAllOld,
	}
	if old > 0 {
		put.ConditionExpression = aws.String("#v = :v")
		put.ExpressionAttributeValues = map[string]types.AttributeValue{":v": number(old)}
	}
	_, err := t.client.PutItem(ctx, put)
	var failed *types.ConditionalCheckFailedException
	if errors.As(err, &failed) {
		// The SDK repeats a call whose reply was lost, and the repeated call
		// finds the item of the first. Not every server returns the item.
		now := failed.Item
		if now == nil {
			if now, err = t.get(ctx, key); err != nil {
				return err
			}
		}
		p := parser{item: now}
		nonce, _, _ := strings.Cut(nonces, " ")
		if slices.Contains(strings.Fields(p.text("nonce")), nonce) {
			return nil
		}
		return errConflict
	}
	if err != nil {
		return fmt.Errorf("PutItem in %s: %w", t.name, err)
	}
	return nil
}

// get returns an item by a strongly consistent read; nil if there is none.
func (t *Table) get(ctx context.Context, key map[string]types.AttributeValue) (map[string]types.AttributeValue, error) {
	out, err := t.client.GetItem(ctx, &dynamodb.GetItemInput{TableName: &t.name, Key: key, ConsistentRead: aws.Bool(true)})
	if err != nil {
		return nil, fmt.Errorf("GetItem in %s: %w", t.name, err)
	}
	return out.Item, nil
}

// query returns all items of a partition whose sort key begins with prefix.
func (t *Table) query(ctx context.Context, pk, prefix string) ([]map[string]types.AttributeValue, error) {
	pages := dynamodb.NewQueryPaginator(t.client, &dynamodb.QueryInput{
		TableName:                &t.name,
		ConsistentRead:           aws.Bool(true),
		KeyConditionExpression:   aws.String("#pk = :pk AND begins_with(#sk, :sk)"),
		ExpressionAttributeNames: map[string]string{"#pk": partitionKey, "#sk": sortKey},
		ExpressionAttributeValues: map[string]types.AttributeValue{
			":pk": &types.AttributeValueMemberS{Value: pk},
			":sk": &types.AttributeValueMemberS{Value: prefix},
		},
	})
	var items []map[string]types.AttributeValue
	for pages.HasMorePages() {
		page, err := pages.NextPage(ctx)
		if err != nil {
			return nil, fmt.Errorf("calling Query in %s: %w", t.name, explained(err))
		}
		items = append(items, page.Items...)
	}
	return items, nil
}
