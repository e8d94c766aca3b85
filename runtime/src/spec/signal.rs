//! Names and numbers of the signal that ends a container.

use oarlock_proto::cri;

use super::SpecError;

const NAMES: &[(&str, i32)] = &[
    ("ABRT", libc::SIGABRT),
    ("ALRM", libc::SIGALRM),
    ("BUS", libc::SIGBUS),
    ("CHLD", libc::SIGCHLD),
    ("CLD", libc::SIGCHLD),
    ("CONT", libc::SIGCONT),
    ("FPE", libc::SIGFPE),
    ("HUP", libc::SIGHUP),
    ("ILL", libc::SIGILL),
    ("INT", libc::SIGINT),
    ("IO", libc::SIGIO),
    ("IOT", libc::SIGIOT),
    ("KILL", libc::SIGKILL),
    ("PIPE", libc::SIGPIPE),
    ("POLL", libc::SIGPOLL),
    ("PROF", libc::SIGPROF),
    ("PWR", libc::SIGPWR),
    ("QUIT", libc::SIGQUIT),
    ("SEGV", libc::SIGSEGV),
    ("STKFLT", libc::SIGSTKFLT),
    ("STOP", libc::SIGSTOP),
    ("SYS", libc::SIGSYS),
    ("TERM", libc::SIGTERM),
    ("TRAP", libc::SIGTRAP),
    ("TSTP", libc::SIGTSTP),
    ("TTIN", libc::SIGTTIN),
    ("TTOU", libc::SIGTTOU),
    ("URG", libc::SIGURG),
    ("USR1", libc::SIGUSR1),
    ("USR2", libc::SIGUSR2),
    ("VTALRM", libc::SIGVTALRM),
    ("WINCH", libc::SIGWINCH),
    ("XCPU", libc::SIGXCPU),
    ("XFSZ", libc::SIGXFSZ),
];
/// The real-time signals as programs see them; the C library keeps the first two of the kernel's.
const RTMIN: i32 = 34;
const RTMAX: i32 = 64;

/// The number for a name (`SIGTERM`, `TERM`, `SIGRTMIN+3`) or a number in digits.
pub(crate) fn number(text: &str) -> Option<i32> {
    if let Ok(number) = text.parse::<i32>() {
        return (1..=RTMAX).contains(&number).then_some(number);
    }
    let upper = text.to_ascii_uppercase();
    let bare = upper.strip_prefix("SIG").unwrap_or(&upper);
    if let Some((_, number)) = NAMES.iter().find(|(name, _)| *name == bare) {
        return Some(*number);
    }
    let offset = |rest: &str| if rest.is_empty() { Some(0) } else { rest.parse::<i32>().ok() };
    let number = if let Some(rest) = bare.strip_prefix("RTMIN") {
        RTMIN + offset(rest)?
    } else {
        RTMAX + offset(bare.strip_prefix("RTMAX")?)?
    };
    (RTMIN..=RTMAX).contains(&number).then_some(number)
}

/// What ends a container: CRI's choice, else the image's, else SIGTERM.
pub(crate) fn stop_signal(config: i32, image: Option<&str>) -> Result<i32, SpecError> {
    let wanted = cri::Signal::try_from(config)
        .map_err(|_| SpecError::invalid("stop_signal", format!("unknown signal {config}")))?;
    if wanted != cri::Signal::RuntimeDefault {
        // SIGNAL_SIGRTMINPLUS1 and SIGNAL_SIGRTMAXMINUS1 are the enumeration's spelling of RTMIN+1 and RTMAX-1.
        let name = wanted.as_str_name().trim_start_matches("SIGNAL_").replace("PLUS", "+").replace("MINUS", "-");
        return number(&name).ok_or_else(|| SpecError::invalid("stop_signal", format!("unknown signal {name}")));
    }
    // An image's signal that nobody knows must not keep its containers from being stopped.
    Ok(image.and_then(number).unwrap_or(libc::SIGTERM))
}

/// The enumeration value for a number, for ContainerStatus.
pub(crate) fn to_cri(signal: i32) -> i32 {
    let all = (0..).map_while(|value| cri::Signal::try_from(value).ok());
    all.filter(|known| *known != cri::Signal::RuntimeDefault)
        .find(|known| stop_signal(*known as i32, None) == Ok(signal))
        .unwrap_or(cri::Signal::RuntimeDefault) as i32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_signal_of_the_interface_has_a_number() {
        for value in (0..).map_while(|value| cri::Signal::try_from(value).ok()) {
            let number = stop_signal(value as i32, None).unwrap();
            assert!((1..=64).contains(&number), "{value:?} {number}");
        }
    }

    #[test]
    fn names_numbers_and_offsets_are_understood() {
        assert_eq!(number("SIGQUIT"), Some(3));
        assert_eq!(number("usr1"), Some(10));
        assert_eq!(number("15"), Some(15));
        assert_eq!(number("SIGRTMIN+3"), Some(37));
        assert_eq!(number("SIGRTMAX-14"), Some(50));
        assert_eq!(number("SIGRTMIN+60"), None);
        assert_eq!(number("NOPE"), None);
        assert_eq!(number("0"), None);
    }

    #[test]
    fn the_interface_goes_before_the_image() {
        assert_eq!(stop_signal(cri::Signal::Sigint as i32, Some("SIGQUIT")), Ok(2));
        assert_eq!(stop_signal(0, Some("SIGQUIT")), Ok(3));
        assert_eq!(stop_signal(0, None), Ok(15));
        assert_eq!(to_cri(15), cri::Signal::Sigterm as i32);
    }
}
