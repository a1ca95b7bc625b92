package gateway

import (
	"errors"
	"fmt"
	"time"

	"github.com/sallyport-ssh/sallyport/internal/auth"
	"github.com/sallyport-ssh/sallyport/internal/bastion"
	"github.com/sallyport-ssh/sallyport/internal/policy"
)

// This file holds every sentence that the gateway shows to users. The rules:
//
//   - Name the thing, then the action. Full sentences, without terms of AWS: the
//     reader knows ssh, not ECS.
//   - Never include the text of an error. Errors are for the operator's log, and may
//     name AWS accounts, subnets and roles.
//   - If the operator's log has the cause, end with the connection's reference.
//
// docs/troubleshooting.md has a row for each sentence.

// startingMessage is shown before the dots.
const startingMessage = "Starting your bastion "

// stillStartingMessage is shown on terminals, before the dots, if the login has succeeded
// before the bastion is connected. Usually is left out if it is zero.
func stillStartingMessage(waited, usually time.Duration) string {
	text := "Your bastion is still starting, " + shortTime(waited)
	if usually > 0 {
		text += "; usually " + shortTime(usually)
	}
	return text + " "
}

// shortTime formats a time in whole seconds, such as "40 s".
func shortTime(d time.Duration) string {
	return fmt.Sprintf("%d s", max(1, int64(d.Round(time.Second)/time.Second)))
}

// notGrantedMessage is for a session that the gateway confirmed while the bastion was
// starting, and the bastion then refused.
func notGrantedMessage(ref string) string {
	return WithRef("Your bastion has started, but it refused this session, its terminal or its command. Connect again; if that does not help, ask your administrator.", ref)
}

// proxyMessage is for a connection from a load balancer's address without a valid header.
const proxyMessage = "This address is a load balancer's, so connections from it must begin with a PROXY protocol header. Connect from another address, or ask your administrator."

// penaltyMessage is for a connection that is rejected because of err, a penalty of its
// source. It begins with the words of sshd, which people search for, and so does
// startupsMessage.
func penaltyMessage(err error) string {
	penalty := (*penaltyError)(nil)
	if !errors.As(err, &penalty) {
		return "Not allowed at this time: too many logins have failed. Try again later, or ask your administrator."
	}
	return "Not allowed at this time: too many logins from your address have failed. Try again in " + waitText(penalty.left) + ", or ask your administrator."
}

// startupsMessage is for a connection that is rejected because of err, by MaxStartups.
func startupsMessage(err error) string {
	if errors.Is(err, errSourceStartups) {
		return "Exceeded MaxStartups: too many connections from your address have not logged in yet. Try again in a minute."
	}
	return "Exceeded MaxStartups: too many connections have not logged in yet. Try again in a moment."
}

// nameMessage is for a login with a name that no user can have, such as that of a Windows
// domain's account.
const nameMessage = "This user name is not valid here. A user name has 1 to 64 of the characters a-z, A-Z, 0-9, . _ @ and -, without a domain and a backslash before it.\r\n"

// busyMessage is for a connection that fails by a shortage; see isShortage.
const busyMessage = "The gateway is busy and cannot serve this connection. Try again in a minute; if it stays busy, tell your administrator."

// tooManyTriesMessage begins with the words of sshd, which people search for.
const tooManyTriesMessage = "Too many authentication failures. If your client has offered many keys, name the right one: ssh -o IdentitiesOnly=yes -i FILE.\r\n"

// userMessage returns the message for a login or session that failed with err.
func userMessage(err error, ref string) string {
	tooOften := (*bastion.TooOftenError)(nil)
	logLimit := (*errLogLimit)(nil)
	rate := (*RateError)(nil)
	switch {
	case isShortage(err):
		return WithRef(busyMessage, ref)
	case errors.As(err, &tooOften):
		return "You have started too many bastions recently. Try again in " + waitText(tooOften.Wait) + "; running bastions are not affected."
	case errors.Is(err, errTooManyConnections):
		return "You have too many connections open. Close some and try again."
	case errors.Is(err, errRevoked):
		return WithRef("Your key is accepted, but an administrator has revoked your access for the time being. Ask your administrator.", ref)
	case errors.Is(err, ErrMisnamed):
		return WithRef("This request is signed for another host than this gateway. Use the gateway's own name in the URL, or ask your administrator.", ref)
	case errors.Is(err, ErrClock):
		return "This request was signed at another time than the gateway's. Set the clock of your machine, and sign each request when you send it."
	case errors.Is(err, ErrReplayed):
		return "This request was received before. Sign each request anew."
	case errors.As(err, &rate):
		return "You have sent too many requests. Try again in " + waitText(rate.Wait) + "."
	case errors.Is(err, ErrUnproven):
		return WithRef("This request needs a signature by an SSH key of the user whom it names, or a valid token.", ref)
	case errors.Is(err, ErrCodeNeeded):
		return "You need a verification code beside your key. Send the digits of your authenticator app in the header Sallyport-Code, or use gateway ctl --code."
	case errors.Is(err, auth.ErrCode):
		return "The verification code is wrong. Send the digits that your authenticator app shows now."
	case codeMessage(err) != "":
		return codeMessage(err)
	case errors.Is(err, errNoSecret):
		return WithRef("Logins here need a verification code, and no authenticator app is set up for you. Ask your administrator for a QR code, scan it with the app, and log in again.", ref)
	case errors.Is(err, errAudit):
		return WithRef("The audit log cannot be written, so logins and new sessions are disabled. Tell your administrator.", ref)
	case errors.As(err, &logLimit):
		if logLimit.wait == 0 {
			return logLimitMessage(ref)
		}
		return WithRef("Your connections have caused more log entries than one user may cause. Try again in "+waitText(logLimit.wait)+"; if you do not know why, ask your administrator.", ref)
	case errors.Is(err, bastion.ErrNoProfile):
		return "No profile has this name. Use the name of a profile after the + in the user name, or leave the + out for the default profile."
	case errors.Is(err, policy.ErrNoRole):
		return WithRef("Your key is accepted, but you have no role that permits anything here. Ask your administrator for a role.", ref)
	case errors.Is(err, policy.ErrProfile):
		return WithRef("None of your roles permits this profile. Use another profile after the + in the user name, or ask your administrator.", ref)
	case errors.Is(err, policy.ErrFrom):
		return WithRef("Your role does not permit connections from this address. Connect from another address, or ask your administrator.", ref)
	case errors.Is(err, policy.ErrHours):
		return WithRef("Your role does not permit connections at this time. Connect within the hours of your role, or ask your administrator.", ref)
	case errors.Is(err, bastion.ErrTooMany):
		return "You have as many bastions as your role permits. Stop one on your console, or wait until an idle one has ended, and try again."
	case errors.Is(err, errForcedCommand):
		return "This key may run one command only, so it cannot open the console. Use another key."
	case errors.Is(err, bastion.ErrHostKey):
		return WithRef("Your bastion did not have its known host key, so you were not connected to it. Tell your administrator at once.", ref)
	case errors.Is(err, bastion.ErrCapacity):
		return WithRef("AWS has no capacity for your bastion right now. Try again in a minute.", ref)
	case errors.Is(err, bastion.ErrQuota):
		return WithRef("Your organisation's limit of running bastions is reached. Try again later, or ask your administrator for a higher limit.", ref)
	case errors.Is(err, bastion.ErrBusy):
		return WithRef("Too many bastions are being started right now. Try again in a minute.", ref)
	case errors.Is(err, bastion.ErrMemory):
		return WithRef("Your bastion ran out of memory while it started. Tell your administrator.", ref)
	case errors.Is(err, bastion.ErrPlatform):
		return WithRef("AWS could not set up the network of your bastion. Try again; if it happens twice, tell your administrator.", ref)
	case errors.Is(err, bastion.ErrImage):
		return WithRef("The image of your bastion could not be loaded. Tell your administrator.", ref)
	case errors.Is(err, bastion.ErrSecrets):
		return WithRef("The secrets of your bastion could not be read. Tell your administrator.", ref)
	case errors.Is(err, bastion.ErrDenied):
		return WithRef("The gateway is not permitted to start your bastion. Tell your administrator.", ref)
	case errors.Is(err, bastion.ErrConfig):
		return WithRef("The gateway's settings for this bastion are wrong. Tell your administrator.", ref)
	case errors.Is(err, bastion.ErrTimeout):
		return WithRef("Your bastion did not start in time. Try again; if it happens twice, tell your administrator.", ref)
	case errors.Is(err, bastion.ErrLedger):
		return WithRef("The gateway cannot find out whether you have a bastion, so it starts none. Try again in a minute; if it happens again, tell your administrator.", ref)
	case errors.Is(err, bastion.ErrNoAnswer):
		return WithRef("Your bastion does not answer. Try again; if that does not help, stop it on your console (as in: ssh -t alice+ctl@gateway stop), and connect again to get a new one.", ref)
	case errors.Is(err, bastion.ErrNoAccount):
		return WithRef("There is no account for you on the machine that runs the bastions. Tell your administrator.", ref)
	case errors.Is(err, auth.ErrUndecided):
		return WithRef("The gateway cannot check this request at the moment. Try again in a minute; if it happens again, tell your administrator.", ref)
	case errors.Is(err, errDraining):
		return "The gateway is going down for maintenance. Connect again in a moment."
	default:
		return WithRef("Your bastion could not be started. Tell your administrator; the gateway's log has the reason.", ref)
	}
}

// codeMessage returns the message for a right verification code that was refused with
// err. It is empty if the code may be wrong.
func codeMessage(err error) string {
	switch {
	case errors.Is(err, auth.ErrCodeUsed):
		return "This verification code has been used. Wait for the next one, half a minute at most."
	case errors.Is(err, auth.ErrCodeLater):
		return "There were too many wrong codes. Wait half a minute and try again."
	}
	return ""
}

// lostMessage is for a session whose bastion was lost. Why is nil if the reason is not
// known.
func lostMessage(why error, ref string) string {
	const again = " Connect again to get a new one"
	switch {
	case errors.Is(why, bastion.ErrMemory):
		return WithRef("Your bastion ran out of memory and has ended, and this session with it."+again+"; if it happens again, ask your administrator for a larger one.", ref)
	case errors.Is(why, bastion.ErrInterrupted):
		return WithRef("AWS has taken back the spare capacity that your bastion ran on, and this session has ended with it."+again+".", ref)
	case errors.Is(why, bastion.ErrMaintenance):
		return WithRef("AWS has ended your bastion for maintenance of its host, and this session with it."+again+".", ref)
	case errors.Is(why, bastion.ErrStopped):
		return WithRef("Your bastion was stopped, and this session with it."+again+"; if you do not know why, ask your administrator.", ref)
	}
	return WithRef("Your bastion has gone, and this session with it."+again+".", ref)
}

// interruptedMessage is for a terminal that sends Ctrl-C while its bastion is starting.
const interruptedMessage = "Interrupted. Your bastion goes on starting; connect again to use it."

// auditLostMessage is for sessions that end because the audit log fails.
const auditLostMessage = "The audit log can no longer be written, so this connection ends. Tell your administrator."

// recordingMessage is for a session whose recording cannot begin, and
// recordingLostMessage for one whose recording fails later.
func recordingMessage(ref string) string {
	return WithRef("This session must be recorded, but the recording cannot be written. Tell your administrator.", ref)
}

func recordingLostMessage(ref string) string {
	return WithRef("The recording of this session can no longer be written, so the session ends. Tell your administrator.", ref)
}

// transfersLostMessage is for an sftp or scp session that must be audited, but whose
// transfers cannot be followed.
func transfersLostMessage(ref string) string {
	return WithRef("The file transfers of this session cannot be logged, because it violates the protocol of sftp or scp, so the session ends. Use another client, or ask your administrator.", ref)
}

// logLimitMessage is for connections that end because LogPerUser is reached.
func logLimitMessage(ref string) string {
	return WithRef("Your connections have caused more log entries than one user may cause, so this connection ends. Find out which program opens so many channels or sessions, or ask your administrator.", ref)
}

// drainMessage is for terminals at the beginning of a drain, goodbyeMessage at its end.
func drainMessage(drain time.Duration) string {
	return fmt.Sprintf("The gateway is going down for maintenance; this connection ends in %s at the latest. Your bastion keeps running: finish your command, then connect again.", drain.Round(time.Second))
}

const goodbyeMessage = "The gateway is going down for maintenance. Connect again; your bastion keeps running."

// expiredMessage is for sessions whose key or certificate has expired, and revokedMessage for
// those whose key is no longer accepted.
const expiredMessage = "The key or certificate you logged in with has expired, so this connection ends. Connect again with a new one."

func revokedMessage(ref string) string {
	return WithRef("The key you logged in with is no longer accepted, so this connection ends. If you do not know why, ask your administrator.", ref)
}

// userRevokedMessage is for sessions of a user whose access is revoked.
func userRevokedMessage(ref string) string {
	return WithRef("An administrator has revoked your access, so this connection ends. Ask your administrator.", ref)
}

// roleEndedMessage is for sessions whose roles no longer permit the login, or permit less.
const roleEndedMessage = "Your role no longer permits this connection, so it ends. Connect again to use your other roles."

// waitText formats a time to wait, rounded up.
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

// WithRef appends a connection's reference to a sentence. The reference is also in the
// operator's log.
func WithRef(sentence, ref string) string {
	return sentence + " (Reference: " + ref + ")"
}
