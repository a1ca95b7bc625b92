package gateway

import (
	"errors"
	"fmt"
	"time"

	"github.com/sallyport-ssh/sallyport/internal/auth"
	"github.com/sallyport-ssh/sallyport/internal/bastion"
	"github.com/sallyport-ssh/sallyport/internal/policy"
)

// This file holds every sentence the gateway says to a person. The rules:
//
//   - Say what happened, then what they can do. Full sentences, no jargon: the
//     reader knows ssh, not ECS.
//   - Never include the text of an error. Errors are for the operator's log,
//     and may name accounts, subnets and roles.
//   - Where the operator's log has the cause, end with the reference that finds
//     it there.

// startingMessage is shown before the dots.
const startingMessage = "Starting your bastion "

// proxyMessage is for whoever connects from a balancer's address and is none.
const proxyMessage = "This address is a load balancer's, and a connection from it must begin with a PROXY protocol header. Connect from another one, or ask your administrator.\r\n"

// userMessage tells a user why there is no bastion.
func userMessage(err error, ref string) string {
	tooOften := (*bastion.TooOftenError)(nil)
	switch {
	case errors.As(err, &tooOften):
		return "Your bastions have been started very often of late. Please try again in " + waitText(tooOften.Wait) + "; one that is running you can use at any time."
	case errors.Is(err, errTooManyConnections):
		return "You have too many connections open. Please close some and try again."
	case errors.Is(err, errAudit):
		return withRef("What is done here cannot be written down at the moment, so nobody can work here. Please tell your administrator.", ref)
	case errors.Is(err, bastion.ErrNoProfile):
		return "There is no bastion of that name for you. What comes after the + in the user name must be a profile; leave it out for the usual one."
	case errors.Is(err, policy.ErrNoRole):
		return withRef("Your key is known, but you have no role here that permits anything. Please ask your administrator for one.", ref)
	case errors.Is(err, policy.ErrProfile):
		return withRef("None of your roles is for this kind of bastion. What comes after the + in the user name must be one that you may have.", ref)
	case errors.Is(err, policy.ErrFrom):
		return withRef("You may not connect from this address. Please connect from where your role permits it, or ask your administrator.", ref)
	case errors.Is(err, policy.ErrHours):
		return withRef("You may not connect at this time. Please come back within the hours of your role, or ask your administrator.", ref)
	case errors.Is(err, bastion.ErrTooMany):
		return "You have as many bastions as your role permits. End one first, on the console or by leaving it alone, and try again."
	case errors.Is(err, errForcedCommand):
		return "This key may run one command only, so it does not open the console. Use another of your keys."
	case errors.Is(err, bastion.ErrHostKey):
		return withRef("Something that is not your bastion answered in its place, so you were not connected to it. Please tell your administrator at once.", ref)
	case errors.Is(err, bastion.ErrCapacity):
		return withRef("AWS has no room for your bastion right now. Please try again in a minute.", ref)
	case errors.Is(err, bastion.ErrQuota):
		return withRef("As many bastions are running as your organisation may have. Please try again later, or ask your administrator for more.", ref)
	case errors.Is(err, bastion.ErrBusy):
		return withRef("Very many bastions are being started right now. Please try again in a minute.", ref)
	case errors.Is(err, bastion.ErrPlatform):
		return withRef("AWS did not get the network for your bastion ready. Please try again; if it happens twice, tell your administrator.", ref)
	case errors.Is(err, bastion.ErrImage):
		return withRef("The software of your bastion could not be loaded. Please tell your administrator.", ref)
	case errors.Is(err, bastion.ErrSecrets):
		return withRef("Your bastion could not be given what it needs to start. Please tell your administrator.", ref)
	case errors.Is(err, bastion.ErrDenied):
		return withRef("The gateway is not permitted to start your bastion. Please tell your administrator.", ref)
	case errors.Is(err, bastion.ErrConfig):
		return withRef("The gateway's settings for this bastion do not work. Please tell your administrator.", ref)
	case errors.Is(err, bastion.ErrTimeout):
		return withRef("Your bastion did not start in time. Please try again; if it happens twice, tell your administrator.", ref)
	case errors.Is(err, bastion.ErrNoAnswer):
		return withRef("Your bastion does not answer at the moment. Please try again; if that does not help, end it on your console, with the command stop (as in: ssh -t alice+ctl@gateway stop), and connect again to get a new one.", ref)
	case errors.Is(err, bastion.ErrNoAccount):
		return withRef("There is no account for you on the machine that runs the bastions. Please tell your administrator.", ref)
	case errors.Is(err, errDraining):
		return "The gateway is going down for maintenance. Please connect again in a moment."
	default:
		return withRef("Your bastion could not be started. Please tell your administrator; the gateway's log has the reason.", ref)
	}
}

// codeMessage tells a user what is wrong with her verification code, where she
// could not know; empty means nothing.
func codeMessage(err error) string {
	switch {
	case errors.Is(err, auth.ErrCodeUsed):
		return "Each code is good for one login. Please wait for the next one, half a minute at most."
	case errors.Is(err, auth.ErrCodeLater):
		return "There were too many wrong codes. Please wait half a minute and try again."
	}
	return ""
}

// lostMessage is what a session sees whose bastion has gone.
func lostMessage(ref string) string {
	return withRef("Your bastion has gone, and this session with it. Connect again and you get a new one.", ref)
}

// auditLostMessage is what sessions see when the audit log fails.
const auditLostMessage = "What is done here can no longer be written down, so this connection ends. Please tell your administrator."

// recordingMessage is for a session that must be recorded and cannot be;
// recordingLostMessage if that became so in the middle of it.
func recordingMessage(ref string) string {
	return withRef("This session would have to be recorded, and that is not possible at the moment. Please tell your administrator.", ref)
}

func recordingLostMessage(ref string) string {
	return withRef("This session can no longer be recorded, so it ends. Please tell your administrator.", ref)
}

// memoryMessage is for a connection that holds more than the gateway can bear.
func memoryMessage(ref string) string {
	return withRef("The gateway was short of memory, and much of it was held by what was sent on this connection and not read at the other end, so it ends. Connect again; if you do not know why, ask your administrator.", ref)
}

func drainMessage(drain time.Duration) string {
	return fmt.Sprintf("The gateway is going down for maintenance; this connection ends in %s at the latest. Your bastion stays: finish what you type, then connect again.", drain.Round(time.Second))
}

const goodbyeMessage = "The gateway is going down for maintenance. Connect again; your bastion is still there."

// expiredMessage and revokedMessage are for sessions that are going on when the
// key by which they came may do so no more.
const expiredMessage = "The key or certificate you logged in with has expired, so this connection ends. Connect again with a new one."

// roleEndedMessage is for sessions whose role holds no longer.
const roleEndedMessage = "Your role does not permit you to be here at this time, so this connection ends. What your other roles permit you can do after connecting again."

func revokedMessage(ref string) string {
	return withRef("The key you logged in with may not be used any more, so this connection ends. If you do not know why, ask your administrator.", ref)
}

// waitText is a time to wait, never too short, for people.
func waitText(d time.Duration) string {
	n, unit := int64((d+time.Second-1)/time.Second), "second"
	if n > 90 {
		n, unit = (n+59)/60, "minute"
	}
	if n != 1 {
		unit += "s"
	}
	return fmt.Sprintf("%d %s", n, unit)
}

func withRef(sentence, ref string) string {
	return sentence + " (Reference: " + ref + ")"
}
