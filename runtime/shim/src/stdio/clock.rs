//! Wall-clock time as container logs write it. Pure but for reading the clock.

use std::time::{SystemTime, UNIX_EPOCH};

/// Now, since the Unix epoch.
pub(crate) fn now_nanos() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_nanos()).unwrap_or(i64::MAX)
}

/// Appends `2026-01-02T03:04:05.000000006Z`.
pub(crate) fn push_rfc3339(nanos: i64, out: &mut Vec<u8>) {
    let seconds = nanos.div_euclid(1_000_000_000);
    let (days, of_day) = (seconds.div_euclid(86_400), seconds.rem_euclid(86_400));
    let (year, month, day) = civil(days);
    push_padded(out, year as u64, 4, b'-');
    push_padded(out, month, 2, b'-');
    push_padded(out, day, 2, b'T');
    push_padded(out, of_day as u64 / 3600, 2, b':');
    push_padded(out, of_day as u64 / 60 % 60, 2, b':');
    push_padded(out, of_day as u64 % 60, 2, b'.');
    push_padded(out, nanos.rem_euclid(1_000_000_000) as u64, 9, b'Z');
}

fn push_padded(out: &mut Vec<u8>, value: u64, width: usize, then: u8) {
    let mut digits = [b'0'; 20];
    let mut rest = value;
    for digit in digits.iter_mut().rev() {
        *digit = b'0' + (rest % 10) as u8;
        rest /= 10;
    }
    out.extend_from_slice(&digits[20 - width..]);
    out.push(then);
}

/// Year, month and day of a day number since 1970-01-01 (Gregorian, counted from 0000-03-01 so that leap days end years).
fn civil(days: i64) -> (i64, u64, u64) {
    let shifted = days + 719_468;
    let era = shifted.div_euclid(146_097);
    let day_of_era = shifted.rem_euclid(146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    (year, month as u64, day as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_instants_are_written_as_rfc_3339() {
        let text = |nanos| {
            let mut out = Vec::new();
            push_rfc3339(nanos, &mut out);
            String::from_utf8(out).unwrap()
        };
        assert_eq!(text(0), "1970-01-01T00:00:00.000000000Z");
        assert_eq!(text(951_782_400_000_000_001), "2000-02-29T00:00:00.000000001Z");
        assert_eq!(text(1_767_225_599_999_999_999), "2025-12-31T23:59:59.999999999Z");
        assert_eq!(text(4_107_542_399_000_000_000), "2100-02-28T23:59:59.000000000Z");
    }
}
