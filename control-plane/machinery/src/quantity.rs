//! Resource quantities as integers. Rounds up, as the API does, so that a fraction is never given away for free.

use k8s_openapi::apimachinery::pkg::api::resource::Quantity;

/// Whole units, rounded up (bytes of memory, pods, devices). An unreadable quantity counts as zero.
pub fn value(quantity: &Quantity) -> i64 {
    scaled(&quantity.0, 1).unwrap_or(0)
}

/// Thousandths, rounded up (CPU). An unreadable quantity counts as zero.
pub fn milli(quantity: &Quantity) -> i64 {
    scaled(&quantity.0, 1000).unwrap_or(0)
}

/// `text` times `scale`, rounded away from zero; `None` if it is not a quantity. Saturates at the limits of i64.
pub fn scaled(text: &str, scale: i128) -> Option<i64> {
    let text = text.trim();
    let (negative, digits) = match text.as_bytes().first()? {
        b'-' => (true, &text[1..]),
        b'+' => (false, &text[1..]),
        _ => (false, text),
    };
    let number_end = digits.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(digits.len());
    let (number, suffix) = digits.split_at(number_end);
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if (whole.is_empty() && fraction.is_empty()) || fraction.contains('.') {
        return None;
    }
    let (numerator, denominator) = multiplier(suffix)?;
    // Beyond 18 digits of fraction nothing of a quantity's precision is left.
    let fraction = &fraction[..fraction.len().min(18)];
    let mantissa: i128 = format!("{whole}{fraction}").parse().ok()?;
    let divisor = 10i128.checked_pow(fraction.len() as u32)?.checked_mul(denominator)?;
    let product = mantissa.checked_mul(numerator).and_then(|product| product.checked_mul(scale));
    let magnitude = product.map_or(i128::MAX, |product| product / divisor + i128::from(product % divisor != 0));
    let magnitude = i64::try_from(magnitude).unwrap_or(i64::MAX);
    Some(if negative { -magnitude } else { magnitude })
}

fn multiplier(suffix: &str) -> Option<(i128, i128)> {
    Some(match suffix {
        "" => (1, 1),
        "n" => (1, 1_000_000_000),
        "u" => (1, 1_000_000),
        "m" => (1, 1000),
        "k" => (1000, 1),
        "M" => (10i128.pow(6), 1),
        "G" => (10i128.pow(9), 1),
        "T" => (10i128.pow(12), 1),
        "P" => (10i128.pow(15), 1),
        "E" => (10i128.pow(18), 1),
        "Ki" => (1 << 10, 1),
        "Mi" => (1 << 20, 1),
        "Gi" => (1 << 30, 1),
        "Ti" => (1 << 40, 1),
        "Pi" => (1 << 50, 1),
        "Ei" => (1 << 60, 1),
        exponent => {
            let exponent: i32 = exponent.strip_prefix(['e', 'E'])?.parse().ok()?;
            let power = 10i128.checked_pow(exponent.unsigned_abs())?;
            if exponent >= 0 { (power, 1) } else { (1, power) }
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn common_forms() {
        let cases = [
            ("100m", 100, 1),
            ("1", 1000, 1),
            ("0.5", 500, 1),
            ("1.5", 1500, 2),
            ("2Ki", 2_048_000, 2048),
            ("1e3", 1_000_000, 1000),
            ("1E", i64::MAX, 1_000_000_000_000_000_000),
            ("100u", 1, 1),
            ("-1500m", -1500, -2),
            ("128Mi", 134_217_728_000, 134_217_728),
            (".5", 500, 1),
        ];
        for (text, milli_units, units) in cases {
            let quantity = Quantity(text.to_owned());
            assert_eq!((milli(&quantity), value(&quantity)), (milli_units, units), "{text}");
        }
    }

    #[test]
    fn nonsense_is_none_and_never_panics() {
        for text in ["", "x", "1x", "1.2.3", "e3", "-", "1e99999999999", "99999999999999999999999999999999999999999"] {
            let read = scaled(text, 1000);
            assert!(read.is_none() || read == Some(i64::MAX), "{text}: {read:?}");
        }
    }

    proptest::proptest! {
        #[test]
        fn whole_numbers_are_exact(number in 0i64..1_000_000_000) {
            proptest::prop_assert_eq!(value(&Quantity(number.to_string())), number);
            proptest::prop_assert_eq!(milli(&Quantity(format!("{number}m"))), number);
        }

        #[test]
        fn any_text_is_survived(text in ".{0,24}") {
            let _ = scaled(&text, 1000);
        }
    }
}
