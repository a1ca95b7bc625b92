package dynamo

import (
	"bytes"
	"context"
	"crypto/ed25519"
	crand "crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"reflect"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/credentials"
	"github.com/aws/aws-sdk-go-v2/service/dynamodb"
	"github.com/aws/aws-sdk-go-v2/service/dynamodb/types"
	"golang.org/x/crypto/ssh"

	"github.com/sallyport-ssh/sallyport/internal/awsfake"
	"github.com/sallyport-ssh/sallyport/internal/bastion"
)

// endpoint is the URL of the server that tests use: the one that
// SALLYPORT_DYNAMODB names, such as moto, or else a dynalite that TestMain starts.
var endpoint string

func TestMain(m *testing.M) {
	stop := func() {}
	if endpoint = os.Getenv("SALLYPORT_DYNAMODB"); endpoint == "" {
		var err error
		if endpoint, stop, err = awsfake.StartDynalite(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	}
	code := m.Run()
	stop()
	os.Exit(code)
}

func config(url string) aws.Config {
	return aws.Config{
		Region:       "eu-central-1",
		Credentials:  credentials.NewStaticCredentialsProvider("test", "test", ""),
		BaseEndpoint: aws.String(url),
	}
}

// newTable returns a new table of its own name.
func newTable(t *testing.T) *Table {
	t.Helper()
	table := New(config(endpoint), "sallyport-"+strings.ToLower(crand.Text()), "prod")
	if err := table.Create(t.Context()); err != nil {
		t.Fatal(err)
	}
	return table
}

// through returns the same table at another endpoint.
func (t *Table) through(url string) *Table { return New(config(url), t.name, t.deployment) }

func hostKey(t *testing.T) ssh.PublicKey {
	t.Helper()
	public, _, err := ed25519.GenerateKey(crand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	key, err := ssh.NewPublicKey(public)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

var alice = bastion.Owner{User: "alice", Profile: "default"}

func TestCreateAndCheck(t *testing.T) {
	table := newTable(t)
	if err := table.Create(t.Context()); err != nil {
		t.Errorf("the second Create: %v", err)
	}
	if err := table.Check(t.Context()); err != nil {
		t.Error(err)
	}

	missing := New(config(endpoint), "missing", "prod")
	if err := missing.Check(t.Context()); err == nil || !strings.Contains(err.Error(), "DescribeTable missing: there is no such table in this account and Region; gateway ledger create-table makes it") {
		t.Errorf("a table that does not exist: %v", err)
	}

	other := New(config(endpoint), "other-"+strings.ToLower(crand.Text()), "prod")
	if _, err := other.client.CreateTable(t.Context(), &dynamodb.CreateTableInput{
		TableName:            &other.name,
		AttributeDefinitions: []types.AttributeDefinition{{AttributeName: aws.String("id"), AttributeType: types.ScalarAttributeTypeN}},
		KeySchema:            []types.KeySchemaElement{{AttributeName: aws.String("id"), KeyType: types.KeyTypeHash}},
		BillingMode:          types.BillingModePayPerRequest,
	}); err != nil {
		t.Fatal(err)
	}
	if err := other.Create(t.Context()); err == nil || !strings.Contains(err.Error(), "use another table") {
		t.Errorf("a table with other keys: %v", err)
	}
}

func TestLedger(t *testing.T) {
	table := newTable(t)
	if e, err := table.Get(t.Context(), alice); err != nil || !reflect.DeepEqual(e, bastion.Entry{}) {
		t.Fatalf("an owner without an item: %+v, %v", e, err)
	}
	starting := bastion.Entry{Generation: 1, State: bastion.Starting, Lease: time.Now().Add(time.Minute).UTC().Round(0), Nonce: "a"}
	first, err := table.Swap(t.Context(), alice, bastion.Entry{}, starting)
	if err != nil || first.Version != 1 {
		t.Fatalf("the first Swap: %+v, %v", first, err)
	}
	if _, err := table.Swap(t.Context(), alice, bastion.Entry{}, bastion.Entry{Generation: 1, Nonce: "b"}); !errors.Is(err, bastion.ErrConflict) {
		t.Errorf("Swap of an old entry: %v, want ErrConflict", err)
	}
	running := bastion.Entry{
		Generation: 2, State: bastion.Running, Since: time.Now().UTC().Round(0), Nonce: "c",
		Task: bastion.Task{ID: "arn:aws:ecs:eu-central-1:123456789012:task/c/1", Principal: "p", Addr: "10.0.0.1:2022", Generation: 2, HostKey: hostKey(t)},
	}
	second, err := table.Swap(t.Context(), alice, first, running)
	if err != nil || second.Version != 2 {
		t.Fatalf("the second Swap: %+v, %v", second, err)
	}
	if got, err := table.Get(t.Context(), alice); err != nil || !reflect.DeepEqual(got, second) {
		t.Errorf("then\n got %+v, %v\nwant %+v", got, err, second)
	}
	running.Nonce = "d"
	if _, err := table.Swap(t.Context(), alice, first, running); !errors.Is(err, bastion.ErrConflict) {
		t.Errorf("a Swap of an older version: %v", err)
	}

	// Owners, profiles and deployments have separate entries.
	for _, other := range []bastion.Owner{{User: "alice", Profile: "big"}, {User: "alic", Profile: "edefault"}, {User: "alice/bastion", Profile: "default"}} {
		if e, err := table.Get(t.Context(), other); err != nil || e.Version != 0 {
			t.Errorf("%s: %+v, %v", other, e, err)
		}
	}
	if e, err := New(config(endpoint), table.name, "test").Get(t.Context(), alice); err != nil || e.Version != 0 {
		t.Errorf("another deployment: %+v, %v", e, err)
	}
}

// TestChangedItem: if another program has made an item malformed, Get fails. It must
// not panic, nor return the zero Entry, because then a second bastion would be
// started.
func TestChangedItem(t *testing.T) {
	table := newTable(t)
	text := func(s string) types.AttributeValue { return &types.AttributeValueMemberS{Value: s} }
	for name, change := range map[string]map[string]types.AttributeValue{
		"no version":    {"version": nil},
		"version":       {"version": text("1")},
		"no state":      {"state": nil},
		"state":         {"state": text("stopping")},
		"kind of state": {"state": number(2)},
		"no task":       {"task": nil},
		"host key":      {"host_key": text("ssh-ed25519 AAAA")},
		"since":         {"since": text("yesterday")},
		"generation":    {"generation": number(-1)},
	} {
		item := formatEntry(bastion.Entry{Version: 1, Generation: 1, State: bastion.Running, Task: bastion.Task{ID: "x", Addr: "y", HostKey: hostKey(t)}})
		for k, v := range table.ownerKey(alice) {
			item[k] = v
		}
		for k, v := range change {
			if item[k] = v; v == nil {
				delete(item, k)
			}
		}
		if _, err := table.client.PutItem(t.Context(), &dynamodb.PutItemInput{TableName: &table.name, Item: item}); err != nil {
			t.Fatal(err)
		}
		if e, err := table.Get(t.Context(), alice); err == nil || !strings.Contains(err.Error(), "alice+default") {
			t.Errorf("%s: %+v, %v", name, e, err)
		}
	}
}

// A faulty server is a proxy of the real one that can drop requests and responses.
type faulty struct {
	http.Handler
	// fate returns the handler that answers an operation, and whether the real
	// server carries it out before. If answer is nil, the real server answers.
	fate func(operation string) (carryOut bool, answer http.HandlerFunc)
}

func (f *faulty) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	_, operation, _ := strings.Cut(r.Header.Get("X-Amz-Target"), ".")
	carryOut, answer := f.fate(operation)
	switch {
	case answer == nil:
		f.Handler.ServeHTTP(w, r)
		return
	case carryOut:
		f.Handler.ServeHTTP(httptest.NewRecorder(), r)
	default:
		io.Copy(io.Discard, r.Body)
	}
	answer(w, r)
}

func newFaulty(t *testing.T, fate func(operation string) (bool, http.HandlerFunc)) string {
	to, err := url.Parse(endpoint)
	if err != nil {
		t.Fatal(err)
	}
	server := httptest.NewServer(&faulty{httputil.NewSingleHostReverseProxy(to), fate})
	t.Cleanup(server.Close)
	return server.URL
}

// hangUp closes the connection without a response.
func hangUp(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }

// awsError answers as DynamoDB does, see "Error handling with DynamoDB" in its
// developer guide.
func awsError(status int, code string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		body, _ := json.Marshal(map[string]string{"__type": "com.amazonaws.dynamodb.v20120810#" + code, "message": "injected"})
		w.Header().Set("Content-Type", "application/x-amz-json-1.0")
		w.WriteHeader(status)
		io.Copy(w, bytes.NewReader(body))
	}
}

// TestLostReply: if the response of a write is lost and the write is retried, its own
// first attempt is not reported as a conflict.
func TestLostReply(t *testing.T) {
	table := newTable(t)
	lost := 0
	ours := table.through(newFaulty(t, func(operation string) (bool, http.HandlerFunc) {
		if operation == "PutItem" && lost == 0 {
			lost++
			return true, hangUp
		}
		return true, nil
	}))
	made, err := ours.Swap(t.Context(), alice, bastion.Entry{}, bastion.Entry{Generation: 1, State: bastion.Starting, Nonce: "mine"})
	if err != nil || made.Version != 1 || lost != 1 {
		t.Fatalf("with %d replies lost: %+v, %v", lost, made, err)
	}
	if got, err := table.Get(t.Context(), alice); err != nil || !reflect.DeepEqual(got, made) {
		t.Errorf("then %+v, %v", got, err)
	}
}

// TestUnreachable: if the table cannot be reached, the error is not ErrConflict, and
// Get does not return the zero Entry without an error.
func TestUnreachable(t *testing.T) {
	table := newTable(t)
	for name, answer := range map[string]http.HandlerFunc{
		"refused":   hangUp,
		"denied":    awsError(400, "AccessDeniedException"),
		"throttled": awsError(400, "ProvisionedThroughputExceededException"),
		"broken":    awsError(500, "InternalServerError"),
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			down := table.through(newFaulty(t, func(string) (bool, http.HandlerFunc) { return false, answer }))
			if e, err := down.Get(t.Context(), alice); err == nil || errors.Is(err, bastion.ErrConflict) {
				t.Errorf("Get: %+v, %v", e, err)
			}
			if e, err := down.Swap(t.Context(), alice, bastion.Entry{}, bastion.Entry{Generation: 1}); err == nil || errors.Is(err, bastion.ErrConflict) {
				t.Errorf("Swap: %+v, %v", e, err)
			}
		})
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	gone := errors.New("the client has left")
	cancel(gone)
	if _, err := table.Get(ctx, alice); !errors.Is(err, context.Canceled) {
		t.Errorf("after its context: %v", err)
	}
}

// TestCrowd: many users at once use few connections, and each of them gets an answer if the
// table answers the third attempt only.
func TestCrowd(t *testing.T) {
	table := newTable(t)
	to, err := url.Parse(endpoint)
	if err != nil {
		t.Fatal(err)
	}
	proxy := httputil.NewSingleHostReverseProxy(to)
	var mu sync.Mutex
	attempts := map[string]int{} // by request
	now, most := 0, 0
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		mu.Lock()
		attempts[string(body)]++
		attempt := attempts[string(body)]
		now++
		most = max(most, now)
		mu.Unlock()
		r.Body = io.NopCloser(bytes.NewReader(body))
		answer := httptest.NewRecorder()
		if attempt < 3 {
			awsError(500, "InternalServerError")(answer, r)
		} else {
			proxy.ServeHTTP(answer, r)
		}
		mu.Lock()
		now-- // before the client gets the answer, and makes another call
		mu.Unlock()
		for name, values := range answer.Header() {
			w.Header()[name] = values
		}
		w.WriteHeader(answer.Code)
		w.Write(answer.Body.Bytes())
	}))
	defer server.Close()
	crowded := table.through(server.URL)
	var users sync.WaitGroup
	for i := range 300 {
		users.Go(func() {
			if _, err := crowded.Get(t.Context(), bastion.Owner{User: fmt.Sprint("user", i), Profile: "default"}); err != nil {
				t.Error(err)
			}
		})
	}
	users.Wait()
	if most > maxCalls {
		t.Errorf("%d calls at once", most)
	}
}

// TestUpdate: no concurrent update of several gateways is lost. If change returns an
// error, nothing is written.
func TestUpdate(t *testing.T) {
	table := newTable(t)
	url := newFaulty(t, func(operation string) (bool, http.HandlerFunc) {
		if operation == "PutItem" && rand.IntN(10) == 0 {
			return true, hangUp
		}
		return true, nil
	})
	const gateways, changes = 3, 5
	var wg sync.WaitGroup
	for range gateways {
		wg.Go(func() {
			ours := table.through(url)
			for range changes {
				err := ours.Update(t.Context(), "alice", "count", func(old string) (string, error) { return old + "x", nil })
				if err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	refused := errors.New("enough")
	err := table.Update(t.Context(), "alice", "count", func(old string) (string, error) {
		if old != strings.Repeat("x", gateways*changes) {
			t.Errorf("after %d changes: %q", gateways*changes, old)
		}
		return "", refused
	})
	if !errors.Is(err, refused) {
		t.Error(err)
	}
	for _, other := range [][2]string{{"alice", "coun"}, {"alic", "count"}} {
		table.Update(t.Context(), other[0], other[1], func(old string) (string, error) {
			if old != "" {
				t.Errorf("%q has %q", other, old)
			}
			return old, nil
		})
	}
}

func TestHeartbeats(t *testing.T) {
	table := newTable(t)
	now := time.Now().UTC().Round(0)
	b := Gateway{ID: "b", Version: "v1", Settings: "x", Address: "10.0.0.7:22", Draining: true, Connections: 7, Started: now.Add(-time.Hour), Seen: now}
	a := Gateway{ID: "a", Version: "v2", Started: now, Seen: now}
	for _, g := range []Gateway{b, {ID: "a", Started: now, Seen: now}, a} {
		if err := table.Beat(t.Context(), g); err != nil {
			t.Fatal(err)
		}
	}
	if all, err := table.Gateways(t.Context()); err != nil || !reflect.DeepEqual(all, []Gateway{a, b}) {
		t.Errorf("got %+v, %v", all, err)
	}
	if all, err := New(config(endpoint), table.name, "other").Gateways(t.Context()); err != nil || len(all) > 0 {
		t.Errorf("another deployment has %+v, %v", all, err)
	}
	for range 2 {
		if err := table.Leave(t.Context(), "b"); err != nil {
			t.Error(err)
		}
	}
	if all, err := table.Gateways(t.Context()); err != nil || len(all) != 1 {
		t.Errorf("then %+v, %v", all, err)
	}
}

// TestConcurrentSwaps: several gateways swap one entry at once, while calls fail
// before and after they are carried out. Each successful Swap replaces the entry of
// the one before.
func TestConcurrentSwaps(t *testing.T) {
	table := newTable(t)
	url := newFaulty(t, func(string) (bool, http.HandlerFunc) {
		switch n := rand.IntN(100); {
		case n < 5:
			return true, hangUp
		case n < 10:
			return false, hangUp
		case n < 15:
			return rand.IntN(2) == 0, awsError(500, "InternalServerError")
		case n < 20:
			return false, awsError(400, "ThrottlingException")
		}
		return true, nil
	})
	const gateways, changes = 4, 10
	var wg sync.WaitGroup
	for range gateways {
		wg.Go(func() {
			ours := table.through(url)
			for made := 0; made < changes; {
				old, err := ours.Get(t.Context(), alice)
				if err != nil {
					continue // three attempts failed
				}
				nonce := crand.Text()
				_, err = ours.Swap(t.Context(), alice, old, bastion.Entry{Generation: old.Generation + 1, Nonce: nonce})
				if err != nil && !errors.Is(err, bastion.ErrConflict) {
					// The Swap may have been carried out, so read the entry, as the
					// dialer does. If another gateway has replaced it since, the
					// nonce is gone: stop counting.
					now, err := table.Get(t.Context(), alice)
					if err != nil {
						t.Error(err)
						return
					}
					if now.Version > old.Version+1 {
						t.Log("unknown whether this Swap was carried out")
						continue
					}
					if now.Nonce == nonce {
						made++
					}
					continue
				}
				if err == nil {
					made++
				}
			}
		})
	}
	wg.Wait()
	e, err := table.Get(t.Context(), alice)
	if err != nil {
		t.Fatal(err)
	}
	if e.Generation != e.Version || e.Generation < gateways*changes {
		t.Errorf("after %d changes the entry is %+v", gateways*changes, e)
	}
}

func FuzzEntry(f *testing.F) {
	f.Add([]byte(`{"version":{"N":"3"},"state":{"S":"running"},"task":{"S":"arn"},"addr":{"S":"10.0.0.1:2022"},"since":{"S":"2026-01-01T00:00:00Z"}}`))
	f.Add([]byte(`{"version":{"N":"1e9"},"state":{"S":"idle"},"host_key":{"S":"ssh-ed25519 AAAA"},"lease":{"S":""}}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		var raw map[string]struct{ S, N *string }
		if json.Unmarshal(data, &raw) != nil {
			return
		}
		item := map[string]types.AttributeValue{}
		for name, v := range raw {
			switch {
			case v.S != nil:
				item[name] = &types.AttributeValueMemberS{Value: *v.S}
			case v.N != nil:
				item[name] = &types.AttributeValueMemberN{Value: *v.N}
			}
		}
		e, err := parseEntry(item)
		if err != nil {
			return
		}
		if e.State == bastion.Running && (e.Task.ID == "" || e.Task.Addr == "") {
			t.Errorf("accepted %s", data)
		}
		again, err := parseEntry(formatEntry(e))
		if err != nil || !again.Since.Equal(e.Since) || again.Version != e.Version || again.State != e.State {
			t.Errorf("%+v became %+v, %v", e, again, err)
		}
	})
}

// TestRevoked: what one gateway stores about a user, another reads.
func TestRevoked(t *testing.T) {
	table := newTable(t)
	other := New(config(endpoint), table.name, "other")
	if texts, err := table.Revoked(t.Context()); err != nil || len(texts) != 0 {
		t.Errorf("at first: %v, %v", texts, err)
	}
	for _, w := range []struct{ user, text string }{{"alice", "one"}, {"bob", "two"}, {"alice", "three"}, {"bob", ""}, {"carol", ""}, {"a@b.example", "four"}} {
		if err := table.SetRevoked(t.Context(), w.user, w.text); err != nil {
			t.Fatal(err)
		}
	}
	if texts, err := table.Revoked(t.Context()); err != nil || !reflect.DeepEqual(texts, map[string]string{"alice": "three", "a@b.example": "four"}) {
		t.Errorf("then: %v, %v", texts, err)
	}
	if texts, err := other.Revoked(t.Context()); err != nil || len(texts) != 0 {
		t.Errorf("in another deployment: %v, %v", texts, err)
	}
	if all, err := table.Gateways(t.Context()); err != nil || len(all) != 0 {
		t.Errorf("as gateways: %v, %v", all, err)
	}
	// An item of another program revokes, too.
	item := table.key("d/prod", revokedPrefix+"eve")
	item["value"] = number(7)
	if _, err := table.client.PutItem(t.Context(), &dynamodb.PutItemInput{TableName: &table.name, Item: item}); err != nil {
		t.Fatal(err)
	}
	if texts, err := table.Revoked(t.Context()); err != nil || len(texts) != 3 {
		t.Errorf("with a malformed item: %v, %v", texts, err)
	}
	missing := New(config(endpoint), "missing", "prod")
	if _, err := missing.Revoked(t.Context()); err == nil {
		t.Error("a table that does not exist has revoked users")
	}
	if missing.SetRevoked(t.Context(), "alice", "x") == nil || missing.SetRevoked(t.Context(), "alice", "") == nil {
		t.Error("written to a table that does not exist")
	}
}
