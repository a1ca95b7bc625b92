package main

import (
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/sallyport-ssh/sallyport/internal/awsfake"
)

// serveSecrets imitates Systems Manager: the parameter NAME is the file stored/NAME,
// a SecureString unless its name ends in .plain, .pub or .yaml or it is below users.
// While the file denied exists, all access is denied. It also imitates the agent of ECS,
// and appends requests for protection to the file protection.
func (env *scriptEnv) serveSecrets(ts *testscript.TestScript, _ []string) {
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var in struct {
			Name, Path     string
			WithDecryption bool
		}
		answer := func(status int, body any) {
			w.Header().Set("Content-Type", "application/x-amz-json-1.1")
			w.WriteHeader(status)
			json.NewEncoder(w).Encode(body)
		}
		type failure struct {
			Type    string `json:"__type"`
			Message string `json:"message"`
		}
		if r.Method == "PUT" && r.URL.Path == "/agent/task-protection/v1/state" {
			var protection struct{ ProtectionEnabled bool }
			text, err := io.ReadAll(r.Body)
			if err == nil {
				err = errors.Join(json.Unmarshal(text, &protection), env.appendTo("protection", string(text)))
			}
			if err != nil {
				http.Error(w, err.Error(), 500)
				return
			}
			answer(200, map[string]any{"protection": protection})
			return
		}
		err := json.NewDecoder(r.Body).Decode(&in)
		action, ok := strings.CutPrefix(r.Header.Get("X-Amz-Target"), "AmazonSSM.")
		if err != nil || !ok || !in.WithDecryption || strings.Contains(in.Name+in.Path, "..") {
			answer(400, failure{"ValidationException", "not a request for a decrypted parameter"})
			return
		}
		if _, err := os.Stat(env.path("denied")); err == nil {
			answer(400, failure{"AccessDeniedException", "not authorized to perform: ssm:" + action})
			return
		}
		parameter := func(name string) (map[string]any, error) {
			text, err := os.ReadFile(env.path("stored/" + name))
			kind := "SecureString"
			if slices.Contains([]string{".plain", ".pub", ".yaml"}, path.Ext(name)) || strings.HasPrefix(name, "/users/") {
				kind = "String"
			}
			return map[string]any{"Name": name, "Type": kind, "Value": string(text)}, err
		}
		switch action {
		case "GetParameter":
			p, err := parameter(in.Name)
			if err != nil {
				answer(400, failure{"ParameterNotFound", ""})
				return
			}
			answer(200, map[string]any{"Parameter": p})
		case "GetParametersByPath":
			all := []any{}
			files, _ := filepath.Glob(env.path("stored" + in.Path + "/*"))
			for _, file := range files {
				if p, err := parameter(in.Path + "/" + filepath.Base(file)); err == nil {
					all = append(all, p)
				}
			}
			answer(200, map[string]any{"Parameters": all})
		}
	}))
	env.listeners = append(env.listeners, closerFunc(func() error { server.Close(); return nil }))
	env.gatewayEnv = append(awsfake.Environ(server.URL), "ECS_AGENT_URI="+server.URL+"/agent")
	for _, v := range env.gatewayEnv {
		name, value, _ := strings.Cut(v, "=")
		ts.Setenv(name, value)
	}
}

func (env *scriptEnv) appendTo(name, line string) error {
	f, err := os.OpenFile(env.path(name), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	_, err = f.WriteString(line + "\n")
	return errors.Join(err, f.Close())
}
