package secrets

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"net/http/httptest"
	"os"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/aws/retry"
	"github.com/aws/aws-sdk-go-v2/credentials"
	"github.com/aws/aws-sdk-go-v2/service/secretsmanager"
	"github.com/aws/aws-sdk-go-v2/service/ssm"
	"github.com/aws/aws-sdk-go-v2/service/ssm/types"
)

// hidden is a text that no error may have.
const hidden = "HIDDEN-PRIVATE-KEY"

func config(endpoint string) aws.Config {
	return aws.Config{
		Region:       "eu-west-1",
		Credentials:  credentials.NewStaticCredentialsProvider("AKID", "SECRET", ""),
		BaseEndpoint: &endpoint,
		Retryer: func() aws.Retryer {
			return retry.NewStandard(func(o *retry.StandardOptions) {
				o.Backoff = retry.BackoffDelayerFunc(func(int, error) (time.Duration, error) { return 0, nil })
			})
		},
	}
}

// serve serves both services: answer returns the status and body for a target, such
// as AmazonSSM.GetParameter, and a name.
func serve(t *testing.T, answer func(target, name string) (int, string)) *Reader {
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var in struct {
			Name, SecretId, Path, NextToken string
			WithDecryption                  bool
		}
		target := r.Header.Get("X-Amz-Target")
		if err := json.NewDecoder(r.Body).Decode(&in); err != nil || r.Header.Get("Content-Type") != "application/x-amz-json-1.1" ||
			!strings.HasPrefix(r.Header.Get("Authorization"), "AWS4-HMAC-SHA256 ") || in.WithDecryption != strings.HasPrefix(target, "AmazonSSM.GetParameter") {
			t.Errorf("request %s %v: %+v, %v", target, r.Header, in, err)
		}
		status, body := answer(target, in.Name+in.SecretId+in.Path)
		w.Header().Set("Content-Type", "application/x-amz-json-1.1")
		w.WriteHeader(status)
		w.Write([]byte(body))
	}))
	t.Cleanup(server.Close)
	return New(config(server.URL))
}

func TestRead(t *testing.T) {
	const failed = `{"__type":"CODE","message":"HINT"}`
	long := strings.Repeat("x", maxSecret+1)
	fail := func(code string) string { return strings.ReplaceAll(failed, "CODE", code) }
	parameter := func(kind, value string) string {
		return `{"Parameter":{"Name":"n","Type":"` + kind + `","Value":"` + value + `","Version":1}}`
	}
	tests := []struct {
		name, reference string
		status          int
		body            string
		want            Secret
		mistake         string // a prefix
	}{
		{"parameter", "ssm:/sallyport/host_key", 200, parameter("SecureString", `a\nb\n`), Secret{[]byte("a\nb\n"), true}, ""},
		{"version", "ssm:/sallyport/host_key:3", 200, parameter("SecureString", "a"), Secret{[]byte("a"), true}, ""},
		{"plain parameter", "ssm:n", 200, parameter("String", "a"), Secret{[]byte("a"), false}, ""},
		{"secret", "secretsmanager:sallyport/fleet+key", 200, `{"Name":"n","SecretString":"a"}`, Secret{[]byte("a"), true}, ""},
		{"ARN", "secretsmanager:arn:aws:secretsmanager:eu-west-1:123456789012:secret:n-AbCdEf", 200, `{"SecretString":"a"}`, Secret{[]byte("a"), true}, ""},
		{"largest", "secretsmanager:n", 200, `{"SecretString":"` + strings.Repeat(`\u0041`, maxSecret) + `"}`, Secret{[]byte(strings.Repeat("A", maxSecret)), true}, ""},

		{"no parameter", "ssm:n", 400, fail("ParameterNotFound"), Secret{}, `does not exist in the Region eu-west-1; create it there, or correct the name or AWS_REGION (ParameterNotFound: "HINT")`},
		{"no secret", "secretsmanager:n", 400, fail("ResourceNotFoundException"), Secret{}, "does not exist in the Region eu-west-1; "},
		{"denied parameter", "ssm:n", 400, fail("AccessDeniedException"), Secret{}, "access is denied; grant the gateway ssm:GetParameter, and kms:Decrypt "},
		{"denied secret", "secretsmanager:n", 400, fail("AccessDeniedException"), Secret{}, "access is denied; grant the gateway secretsmanager:GetSecretValue, "},
		{"KMS key", "ssm:n", 400, fail("InvalidKeyId"), Secret{}, "cannot be decrypted; "},
		{"decryption", "secretsmanager:n", 400, fail("DecryptionFailure"), Secret{}, "cannot be decrypted; "},
		{"marked for deletion", "secretsmanager:n", 400, fail("InvalidRequestException"), Secret{}, "cannot be read; is it marked for deletion? "},
		{"throttled", "ssm:n", 400, fail("ThrottlingException"), Secret{}, "AWS throttles ssm:GetParameter; try again "},
		{"outage", "ssm:n", 500, fail("InternalServerError"), Secret{}, "ssm:GetParameter failed (InternalServerError: "},
		{"binary", "secretsmanager:n", 200, `{"SecretBinary":"AAAA"}`, Secret{}, "is binary; store the text, with --secret-string "},
		{"too long", "secretsmanager:n", 200, `{"SecretString":"` + long + `"}`, Secret{}, "is longer than 65536 bytes; "},
		{"endless", "secretsmanager:n", 200, `{"SecretString":"` + strings.Repeat("x", maxResponse) + `"}`, Secret{}, "the response is longer than "},
		{"empty", "ssm:n", 200, parameter("SecureString", ""), Secret{}, "is empty; "},
		{"no value", "ssm:n", 200, `{}`, Secret{}, "AWS answered without a value; try again"},
		{"truncated", "ssm:n", 200, `{"Parameter":{"Value":"` + hidden, Secret{}, "the response of AWS cannot be read; "},
		{"wrong type", "ssm:n", 200, `{"Parameter":{"Version":"` + hidden + `"}}`, Secret{}, "the response of AWS cannot be read; "},
		{"not JSON", "secretsmanager:n", 200, hidden, Secret{}, "the response of AWS cannot be read; "},

		{"no name", "ssm:", 0, "", Secret{}, "is not a reference to a secret; "},
		{"space", "secretsmanager:a b", 0, "", Secret{}, "is not a reference to a secret; "},
		{"long name", "ssm:" + long, 0, "", Secret{}, "is longer than 2048 bytes; correct the name"},
		{"service", "vault:a", 0, "", Secret{}, "is not a reference to a secret; "},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			service, name, _ := strings.Cut(tt.reference, ":")
			target := map[string]string{"ssm": "AmazonSSM.GetParameter", "secretsmanager": "secretsmanager.GetSecretValue"}[service]
			r := serve(t, func(gotTarget, gotName string) (int, string) {
				if gotTarget != target || gotName != name || tt.status == 0 {
					t.Errorf("call of %s for %q", gotTarget, gotName)
				}
				return tt.status, tt.body
			})
			got, err := r.Read(t.Context(), tt.reference)
			if tt.mistake == "" {
				if err != nil || string(got.Text) != string(tt.want.Text) || got.Encrypted != tt.want.Encrypted {
					t.Errorf("got %.80q %v, %v", got.Text, got.Encrypted, err)
				}
				return
			}
			if err == nil || !strings.HasPrefix(err.Error(), tt.mistake) || strings.Contains(err.Error(), hidden) || got.Text != nil {
				t.Errorf("got %q, %v; want %s", got.Text, err, tt.mistake)
			}
		})
	}
}

// TestFolder: a folder has the parameters of all pages, or there is an error.
func TestFolder(t *testing.T) {
	const path = "/sallyport/users"
	page := func(next string, names ...string) string {
		var all []map[string]any
		for _, name := range names {
			all = append(all, map[string]any{"Name": name, "Type": "String", "Value": "key of " + name})
		}
		answer := map[string]any{"Parameters": all}
		if next != "" {
			answer["NextToken"] = next
		}
		text, err := json.Marshal(answer)
		if err != nil {
			t.Fatal(err)
		}
		return string(text)
	}
	many := func(first, n int) (names []string) {
		for i := range n {
			names = append(names, fmt.Sprintf("%s/u%d", path, first+i))
		}
		return names
	}
	tests := []struct {
		name    string
		pages   []string // by number of the call
		want    []string
		mistake string // a prefix
	}{
		{"pages", []string{page("1", path+"/alice", path+"/bob.smith"), page("2"), page("", path+"/carol")}, []string{"alice", "bob.smith", "carol"}, ""},
		{"empty", []string{page("")}, nil, ""},
		{"below", []string{page("", path+"/a/b")}, nil, "AWS answered with parameters of another path; try again"},
		{"elsewhere", []string{page("", "/other/alice")}, nil, "AWS answered with parameters of another path; "},
		{"nameless", []string{page("", path+"/")}, nil, "AWS answered with parameters of another path; "},
		{"too many", []string{page("1", many(0, 600)...), page("2", many(600, 401)...)}, nil, "has more than 1000 parameters; "},
		{"denied", []string{page("1", path+"/alice"), `{"__type":"AccessDeniedException","message":"HINT"}`}, nil, "access is denied; grant the gateway ssm:GetParametersByPath, "},
		{"truncated", []string{`{"Parameters":[{"Value":"` + hidden}, nil, "the response of AWS cannot be read; "},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			calls := 0
			r := serve(t, func(target, name string) (int, string) {
				if target != "AmazonSSM.GetParametersByPath" || name != path {
					t.Errorf("call of %s for %q", target, name)
				}
				calls++
				answer := tt.pages[min(calls, len(tt.pages))-1]
				if strings.Contains(answer, "__type") {
					return 400, answer
				}
				return 200, answer
			})
			got, err := r.Folder(t.Context(), "ssm:"+path)
			if tt.mistake != "" {
				if err == nil || !strings.HasPrefix(err.Error(), tt.mistake) || strings.Contains(err.Error(), hidden) || got != nil {
					t.Errorf("got %d, %v; want %s", len(got), err, tt.mistake)
				}
				return
			}
			names := slices.Sorted(maps.Keys(got))
			if err != nil || !slices.Equal(names, tt.want) || calls != len(tt.pages) {
				t.Errorf("got %q, %v after %d calls", names, err, calls)
			}
			for _, name := range names {
				if string(got[name].Text) != "key of "+path+"/"+name || got[name].Encrypted {
					t.Errorf("%s: %q", name, got[name].Text)
				}
			}
		})
	}
	none := serve(t, func(string, string) (int, string) { t.Error("a call"); return 500, "" })
	for _, reference := range []string{"ssm:", "ssm:users", "ssm:/", "ssm:/a/", "ssm:/a b", "ssm:/" + strings.Repeat("x", maxName), "secretsmanager:/users", "ssm:arn:aws:ssm:eu-west-1:123456789012:parameter/users"} {
		if _, err := none.Folder(t.Context(), reference); err == nil || !strings.HasPrefix(err.Error(), "is not the path of parameters; ") {
			t.Errorf("%.60s: %v", reference, err)
		}
	}
}

// TestRetry: Read repeats a call that is throttled or whose reply is lost.
func TestRetry(t *testing.T) {
	calls := 0
	r := serve(t, func(string, string) (int, string) {
		switch calls++; calls {
		case 1:
			return 400, `{"__type":"ThrottlingException","message":"Rate exceeded"}`
		case 2:
			panic(http.ErrAbortHandler)
		}
		return 200, `{"SecretString":"a"}`
	})
	if got, err := r.Read(t.Context(), "secretsmanager:n"); err != nil || string(got.Text) != "a" || calls != 3 {
		t.Errorf("got %q, %v after %d calls", got.Text, err, calls)
	}
}

// clientFunc is an HTTP client in a bubble.
type clientFunc func(*http.Request) (*http.Response, error)

func (f clientFunc) Do(r *http.Request) (*http.Response, error) { return f(r) }

// TestTimeout: Read returns if AWS does not answer, and repeats the call before.
func TestTimeout(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		attempts := 0
		cfg := config("http://aws.invalid")
		cfg.HTTPClient = clientFunc(func(r *http.Request) (*http.Response, error) {
			attempts++
			<-r.Context().Done()
			return nil, r.Context().Err()
		})
		began := time.Now()
		_, err := New(cfg).Read(t.Context(), "ssm:n")
		if err == nil || !strings.HasPrefix(err.Error(), "AWS does not answer ssm:GetParameter; ") || attempts < 2 {
			t.Errorf("after %d attempts: %v", attempts, err)
		}
		if took := time.Since(began); took > readTimeout {
			t.Errorf("Read took %v", took)
		}
	})
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := New(config("http://127.0.0.1:1")).Read(ctx, "ssm:n"); !errors.Is(err, context.Canceled) {
		t.Errorf("canceled: %v", err)
	}
}

// TestMoto reads from the imitation of AWS at $SALLYPORT_SECRETS, an independent one.
func TestMoto(t *testing.T) {
	endpoint := os.Getenv("SALLYPORT_SECRETS")
	if endpoint == "" {
		t.Skip("SALLYPORT_SECRETS is not set; interop/clients/moto.sh sets it")
	}
	cfg := config(endpoint)
	_, err := ssm.NewFromConfig(cfg).PutParameter(t.Context(), &ssm.PutParameterInput{
		Name: aws.String("/sallyport/host_key"), Value: aws.String("a\nb\n"), Type: types.ParameterTypeSecureString, Overwrite: aws.Bool(true)})
	if err != nil {
		t.Fatal(err)
	}
	secrets := secretsmanager.NewFromConfig(cfg)
	created, err := secrets.CreateSecret(t.Context(), &secretsmanager.CreateSecretInput{Name: aws.String("sallyport/fleet_key"), SecretString: aws.String("c\n")})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := secrets.CreateSecret(t.Context(), &secretsmanager.CreateSecretInput{Name: aws.String("binary"), SecretBinary: []byte{0}}); err != nil {
		t.Fatal(err)
	}
	r := New(cfg)
	for reference, want := range map[string]string{"ssm:/sallyport/host_key": "a\nb\n", "secretsmanager:sallyport/fleet_key": "c\n", "secretsmanager:" + *created.ARN: "c\n"} {
		if got, err := r.Read(t.Context(), reference); err != nil || string(got.Text) != want || !got.Encrypted {
			t.Errorf("%s: got %q %v, %v", reference, got.Text, got.Encrypted, err)
		}
	}
	for name, value := range map[string]string{"alice": "a", "bob": "b"} {
		_, err := ssm.NewFromConfig(cfg).PutParameter(t.Context(), &ssm.PutParameterInput{
			Name: aws.String("/sallyport/users/" + name), Value: &value, Type: types.ParameterTypeString, Overwrite: aws.Bool(true)})
		if err != nil {
			t.Fatal(err)
		}
	}
	if users, err := r.Folder(t.Context(), "ssm:/sallyport/users"); err != nil || len(users) != 2 || string(users["alice"].Text) != "a" || users["alice"].Encrypted {
		t.Errorf("users %v, %v", users, err)
	}
	if all, err := r.Folder(t.Context(), "ssm:/sallyport"); err != nil || len(all) != 1 || !all["host_key"].Encrypted {
		t.Errorf("parameters %d, %v", len(all), err)
	}
	for reference, want := range map[string]string{"ssm:/nowhere": "does not exist ", "secretsmanager:nowhere": "does not exist ", "secretsmanager:binary": "is binary; "} {
		if _, err := r.Read(t.Context(), reference); err == nil || !strings.HasPrefix(err.Error(), want) {
			t.Errorf("%s: %v", reference, err)
		}
	}
}
