//! Durations as KubeletConfiguration writes them: `1h30m`, `5m0s`, `300ms`. Pure.

use std::time::Duration;

/// Reads a duration; None when it is not one, or negative.
pub(crate) fn parse(text: &str) -> Option<Duration> {
    if text == "0" {
        return Some(Duration::ZERO);
    }
    let mut rest = text;
    let mut total = Duration::ZERO;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let number: f64 = rest[..digits].parse().ok()?;
        let after = &rest[digits..];
        let end = after.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(after.len());
        let seconds = match &after[..end] {
            "ns" => 1e-9,
            "us" | "µs" => 1e-6,
            "ms" => 1e-3,
            "s" => 1.0,
            "m" => 60.0,
            "h" => 3600.0,
            _ => return None,
        };
        total = total.checked_add(Duration::try_from_secs_f64(number * seconds).ok()?)?;
        rest = &after[end..];
    }
    (!text.is_empty()).then_some(total)
}

/// As Go prints it: `10s`, `2m40s`, `1h0m0s`, `500ms`.
pub(crate) fn show(duration: Duration) -> String {
    let (seconds, nanos) = (duration.as_secs(), duration.subsec_nanos());
    if seconds == 0 && nanos > 0 {
        return format!("{}ms", f64::from(nanos) / 1e6);
    }
    let fraction = if nanos > 0 { format!("{:.3}", f64::from(nanos) / 1e9)[1..].to_owned() } else { String::new() };
    match (seconds / 3600, seconds / 60 % 60, seconds % 60) {
        (0, 0, s) => format!("{s}{fraction}s"),
        (0, m, s) => format!("{m}m{s}{fraction}s"),
        (h, m, s) => format!("{h}h{m}m{s}{fraction}s"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_read_and_printed_as_go_does() {
        for (text, seconds, shown) in [
            ("0", 0.0, "0s"),
            ("10s", 10.0, "10s"),
            ("5m", 300.0, "5m0s"),
            ("1h30m", 5400.0, "1h30m0s"),
            ("2m40s", 160.0, "2m40s"),
            ("300ms", 0.3, "300ms"),
            ("1.5s", 1.5, "1.500s"),
        ] {
            let duration = parse(text).expect(text);
            assert_eq!((duration.as_secs_f64(), show(duration).as_str()), (seconds, shown), "{text}");
        }
        for text in ["", "5", "-5s", "s", "5 s", "1d", "1h30", "99999999999999999999h"] {
            assert_eq!(parse(text), None, "{text}");
        }
    }

    proptest::proptest! {
        #[test]
        fn whole_seconds_come_back(seconds in 0u64..10_000_000) {
            let duration = Duration::from_secs(seconds);
            proptest::prop_assert_eq!(parse(&show(duration)), Some(duration));
        }

        #[test]
        fn any_text_is_survived(text in ".{0,20}") {
            let _ = parse(&text);
        }
    }
}
