package daemon

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/sallyport-ssh/sallyport/internal/config"
	"github.com/sallyport-ssh/sallyport/internal/fargate"
	"github.com/sallyport-ssh/sallyport/internal/secrets"
)

// awsTimeout bounds the reading of all texts in AWS that a configuration refers to.
const awsTimeout = 30 * time.Second

// LoadConfig reads the configuration at path, which may be a reference, and the keys
// that it names; see [config.Load]. copies is as in [config.AWS]; MakeCopies makes
// them. LoadConfig blocks while AWS does not answer, for awsTimeout at most.
func LoadConfig(ctx context.Context, path, copies string) (*config.Gateway, error) {
	ctx, cancel := context.WithTimeout(ctx, awsTimeout)
	defer cancel()
	return config.Load(path, newTexts(nil).forConfig(ctx, copies))
}

// MakeCopies makes the copies of texts in AWS that cfg has, or brings them up to date.
// The error has all mistakes. It blocks like LoadConfig.
func MakeCopies(ctx context.Context, cfg *config.Gateway) error {
	return makeCopies(ctx, cfg.Copies, newTexts(nil))
}

// texts reads texts in AWS. reader is called at the first reference, because most
// configurations have none.
type texts struct {
	reader func(context.Context) (reader, error)
}

// A reader is a [secrets.Reader].
type reader interface {
	Read(ctx context.Context, reference string) (secrets.Secret, error)
	Folder(ctx context.Context, reference string) (map[string]secrets.Secret, error)
}

// An observer observes calls of AWS; see [fargate.Load]. It may be nil.
type observer func(service, operation, result string)

// newTexts returns the texts of the Region and the credentials of the environment.
func newTexts(observed observer) texts {
	var mu sync.Mutex
	var made *secrets.Reader
	return texts{func(ctx context.Context) (reader, error) {
		mu.Lock()
		defer mu.Unlock()
		if made == nil {
			cfg, err := fargate.Load(ctx, observed)
			if err != nil {
				return nil, err
			}
			made = secrets.New(cfg)
		}
		return made, nil
	}}
}

func (t texts) forConfig(ctx context.Context, copies string) *config.AWS {
	return &config.AWS{Copies: copies, Secret: func(reference string) ([]byte, bool, error) {
		secret, err := t.read(ctx, reference)
		return secret.Text, secret.Encrypted, err
	}}
}

func (t texts) read(ctx context.Context, reference string) (secrets.Secret, error) {
	r, err := t.reader(ctx)
	if err != nil {
		return secrets.Secret{}, err
	}
	return r.Read(ctx, reference)
}

// makeCopies reads everything before it changes a file.
func makeCopies(ctx context.Context, copies []config.Copy, t texts) error {
	ctx, cancel := context.WithTimeout(ctx, awsTimeout)
	defer cancel()
	var mistakes config.Mistakes
	contents := make([]map[string]secrets.Secret, len(copies))
	for i, c := range copies {
		var err error
		if contents[i], err = t.content(ctx, c); err != nil {
			mistakes = append(mistakes, c.Mistake(err))
		}
	}
	if mistakes != nil {
		return mistakes
	}
	for i, c := range copies {
		if err := writeCopy(c, contents[i]); err != nil {
			mistakes = append(mistakes, c.Mistake(err))
		}
	}
	if mistakes != nil {
		return mistakes
	}
	return nil
}

// content returns the content of each file of a copy, by name.
func (t texts) content(ctx context.Context, c config.Copy) (map[string]secrets.Secret, error) {
	r, err := t.reader(ctx)
	if err != nil {
		return nil, err
	}
	content := map[string]secrets.Secret{}
	if c.Folder {
		content, err = r.Folder(ctx, c.Reference)
	} else {
		content[filepath.Base(c.Path)], err = r.Read(ctx, c.Reference)
	}
	if err != nil {
		return nil, err
	}
	for name, secret := range content {
		if c.Private && !secret.Encrypted {
			return nil, fmt.Errorf("%s is stored unencrypted; store it as a SecureString, and replace it if others may have read it", name)
		}
	}
	return content, nil
}

func writeCopy(c config.Copy, content map[string]secrets.Secret) error {
	dir := c.Path
	if !c.Folder {
		dir = filepath.Dir(c.Path)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	var problems []error
	for _, name := range slices.Sorted(maps.Keys(content)) {
		if !strings.HasPrefix(name, ".") { // as in a folder of files
			problems = append(problems, replaceFile(dir, name, content[name].Text))
		}
	}
	if c.Folder {
		problems = append(problems, removeOthers(dir, content))
	}
	return errors.Join(problems...)
}

// replaceFile gives the file called name in dir the text, unless it has it. Readers
// find the old text or the new one. The file is not synced, because it is made again
// at the next start.
func replaceFile(dir, name string, text []byte) error {
	if !bytes.HasSuffix(text, []byte("\n")) {
		text = append(slices.Clip(text), '\n') // $(cat FILE) has removed it
	}
	path := filepath.Join(dir, name)
	if now, err := os.ReadFile(path); err == nil && bytes.Equal(now, text) {
		return nil
	}
	// Two gateways may share the folder, while one drains.
	temp := filepath.Join(dir, fmt.Sprintf(".new-%d", os.Getpid()))
	if err := os.WriteFile(temp, text, 0o600); err != nil {
		return err
	}
	return os.Rename(temp, path)
}

// removeOthers removes the files in dir that have no content.
func removeOthers(dir string, content map[string]secrets.Secret) error {
	entries, err := os.ReadDir(dir)
	problems := []error{err}
	for _, e := range entries {
		if _, ok := content[e.Name()]; !ok && !strings.HasPrefix(e.Name(), ".") {
			problems = append(problems, os.Remove(filepath.Join(dir, e.Name())))
		}
	}
	return errors.Join(problems...)
}
