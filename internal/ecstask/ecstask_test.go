package ecstask

import (
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"
)

// The answers have the form of those in the Developer Guide.
func TestProtect(t *testing.T) {
	const arn = `"TaskArn":"arn:aws:ecs:eu-west-1:123456789012:task/sallyport/1234"`
	on := `{"protection":{"ExpirationDate":"2026-12-01T12:00:00Z","ProtectionEnabled":true,` + arn + `}}`
	off := `{"protection":{"ExpirationDate":null,"ProtectionEnabled":false,` + arn + `}}`
	tests := []struct {
		name    string
		d       time.Duration
		request string
		status  int
		answer  string
		mistake string // a prefix
	}{
		{"on", 8 * time.Hour, `{"ExpiresInMinutes":480,"ProtectionEnabled":true}`, 200, on, ""},
		{"rounded", 61 * time.Second, `{"ExpiresInMinutes":2,"ProtectionEnabled":true}`, 200, on, ""},
		{"off", 0, `{"ProtectionEnabled":false}`, 200, off, ""},
		{"ignored", time.Hour, `{"ExpiresInMinutes":60,"ProtectionEnabled":true}`, 200, off, "the answer, with status 200, does not have the protection"},
		{"blocked", time.Hour, `{"ExpiresInMinutes":60,"ProtectionEnabled":true}`, 200, `{"failure":{"Arn":"a","Detail":null,"Reason":"DEPLOYMENT_BLOCKED"}}`, ErrBlocked.Error()},
		{"no service", time.Hour, `{"ExpiresInMinutes":60,"ProtectionEnabled":true}`, 200, `{"failure":{"Arn":"a","Detail":"x","Reason":"TASK_NOT_VALID"}}`, `TASK_NOT_VALID: "x"`},
		{"denied", time.Hour, `{"ExpiresInMinutes":60,"ProtectionEnabled":true}`, 400, `{"requestID":"r","error":{"Arn":"a","Code":"AccessDeniedException","Message":"not authorized"}}`, `AccessDeniedException: "not authorized"`},
		{"nothing", time.Hour, `{"ExpiresInMinutes":60,"ProtectionEnabled":true}`, 404, `{}`, "the answer, with status 404, does not have"},
		{"not JSON", time.Hour, `{"ExpiresInMinutes":60,"ProtectionEnabled":true}`, 502, `<html>`, "the answer, with status 502, is not JSON"},
		{"too long", time.Hour, `{"ExpiresInMinutes":60,"ProtectionEnabled":true}`, 200, `{"x":"` + strings.Repeat("x", maxResponse), "the answer, with status 200, is not JSON"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			agent := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				body, err := io.ReadAll(r.Body)
				if err != nil || r.Method != "PUT" || r.URL.Path != "/api/1234/task-protection/v1/state" || string(body) != tt.request {
					t.Errorf("%s %s: %s, %v", r.Method, r.URL, body, err)
				}
				w.WriteHeader(tt.status)
				w.Write([]byte(tt.answer))
			}))
			defer agent.Close()
			err := Protect(t.Context(), agent.URL+"/api/1234", tt.d)
			if (err == nil) != (tt.mistake == "") || err != nil && !strings.HasPrefix(err.Error(), tt.mistake) {
				t.Errorf("got %v, want %s", err, tt.mistake)
			}
			if errors.Is(err, ErrBlocked) != (tt.name == "blocked") {
				t.Errorf("got %v", err)
			}
		})
	}
	if err := Protect(t.Context(), "http://127.0.0.1:1", time.Hour); err == nil {
		t.Error("no error without an agent")
	}
}
